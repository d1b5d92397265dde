"""Runs the benchmarks, one after another, and writes docs/benchmarks.md with a plot for each.

``python -m benchmarks`` runs all there are; ``python -m benchmarks hop lazy`` runs these, and the
page takes the others from their last run (``runs/benchmarks/*.json``).
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks._report import describe, scale

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = ROOT / "runs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"

INTRODUCTION = """\
# Benchmarks

Every ratio here is **taskgrad's time over its rival's: below 1, taskgrad is faster.** The two are
measured in turns within one run; the ratio is the median over the pairs, and the plots show every
pair. Seconds say more about the machine than about the code.

`python -m benchmarks` runs all of this again and writes this page; `python -m benchmarks.hop` runs
one of them."""


def main() -> int:
    """Run what the command line names; returns the exit status."""
    # gpu has a page of its own, and is run by gpu.sh.
    there = [path.stem for path in sorted(HERE.glob("[!_]*.py")) if path.stem != "gpu"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(there)}")
    chosen = parser.parse_args().names or there
    for name in chosen:
        if name not in there:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(there)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = [name for name in chosen if not _run(name)]
    results = [RESULTS / f"{name}.json" for name in there]
    _write_page([json.loads(path.read_text()) for path in results if path.exists()])
    print(f"wrote {PAGE.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _run(name: str) -> bool:
    path = RESULTS / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0 and path.exists()


def _write_page(results: list[dict[str, Any]]) -> None:
    parts = [INTRODUCTION]
    setups = {_setup(result): None for result in results}
    if len(setups) == 1:
        parts.append(next(iter(setups)))
    for result in results:
        name = result["name"]
        parts.append(f"## {name}")
        if len(setups) > 1:
            parts.append(_setup(result))
        parts.append(ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "")
        if result["ratios"]:
            _plot(result, IMAGES / f"benchmarks-{name}.png")
            parts.append(_table("ratio", result["ratios"]))
            parts.append(f"![ratios of {name}](images/benchmarks-{name}.png)")
        if result["figures"]:
            parts.append(_table("figure", result["figures"]))
    PAGE.write_text("\n\n".join(filter(None, parts)) + "\n")


def _setup(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return f"Measured on: {describe(result['machine'])}; {versions}."


def _table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| {title} | median | lowest | highest | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, row in rows.items():
        factor, unit = scale(row) if "unit" in row else (1.0, "")
        cells = [f"{row[k] * factor:.3g} {unit}".strip() for k in ("median", "min", "max")]
        lines.append(f"| {key} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def _plot(result: dict[str, Any], path: Path) -> None:
    """Every pair as a dot, the median as a bar, on a line for each ratio."""
    ratios = result["ratios"]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.5 * len(ratios)), layout="constrained")
    for place, ratio in enumerate(ratios.values()):
        axes.plot(ratio["all"], [place] * ratio["n"], "o", color="tab:blue", alpha=0.35, ms=5)
        axes.plot(ratio["median"], place, "|", color="black", ms=22, mew=2)
        axes.annotate(
            f"{ratio['median']:.2f}",
            (ratio["median"], place),
            xytext=(0, 13),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.axvline(1, color="tab:gray", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_ylim(len(ratios) - 0.4, -0.7)
    axes.set_xlim(0, max(1.15, *(1.05 * ratio["max"] for ratio in ratios.values())))
    axes.set_xlabel("taskgrad's time over its rival's (1: as fast)")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
