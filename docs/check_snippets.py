"""Run the Python blocks of the documentation.

    python docs/check_snippets.py              # README.md and docs/*.md
    python docs/check_snippets.py docs/guide.md

The ```python blocks of a page run from top to bottom in one namespace, each page in a process of
its own. An error names the page and the line in it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300


def code_of(page: Path) -> str:
    """The page with all but its Python blocks blanked, so that line numbers stay."""
    lines = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def run_here(page: Path) -> None:
    """Run one page's blocks as if they were the main script."""
    code = compile(code_of(page), str(page), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(page)})


def main() -> int:
    """Check the pages given, or all; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.pages[0])
        return 0
    failed = 0
    for page in options.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not code_of(page).strip():
            print(f"----  {page}: no Python blocks")
            continue
        start = time.monotonic()
        command = [sys.executable, __file__, "--here", str(page)]
        try:
            done = subprocess.run(
                command,
                env={"MPLBACKEND": "Agg", **os.environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            output, error = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired as late:
            output, error = f"{(late.stdout or b'').decode()}\nover {TIMEOUT} s", True
        failed += error
        print(f"{'FAIL' if error else 'ok  '}  {page} ({time.monotonic() - start:.0f} s)")
        if error:
            print(output)
    return failed


if __name__ == "__main__":
    sys.exit(main())
