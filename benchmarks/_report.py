"""What every benchmark prints and writes: the machine, the versions, figures and ratios.

A ratio is always our time over the rival's: below 1, taskgrad is the faster one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "dask", "distributed", "taskgrad")


def arguments(
    name: str, description: str | None = None, *, rows: Sequence[str] = (), rounds: int = 0
) -> argparse.Namespace:
    """The command line that all benchmarks share; ``.json`` is a path or None.

    With `rows` the user may choose among them, and ``.rows`` are those to measure; with `rounds`,
    the default, ``.rounds`` is how often each is measured.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there, too")
    if rows:
        listed = ", ".join(rows)
        parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all by default, of: {listed}")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"{rounds} by default")
    options = parser.parse_args()
    if rows:
        unknown = [row for row in options.rows if row not in rows]
        if unknown:
            parser.error(f"there is no row {unknown[0]!r}; there are {listed}")
        options.rows = options.rows or list(rows)
    return options


class Report:
    """Collects what one benchmark measures.

    Parameters
    ----------
    name
        Of the benchmark: the name of its module.

    Examples
    --------
    >>> report = Report("hop")
    >>> report.figure("ours", [0.2, 0.1, 0.3])
    >>> report.figure("stock", [0.4, 0.4, 0.5])
    >>> report.ratio("same_worker", [0.2, 0.1, 0.3], [0.4, 0.4, 0.5])
    0.5
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: dict[str, dict[str, Any]] = {}
        self.ratios: dict[str, dict[str, Any]] = {}
        self._shown: set[str] | None = None  # keys of what is printed; None before the first line

    def figure(self, key: str, seconds: Sequence[float], unit: str = "s") -> None:
        """Add repeated measurements of one thing, by default in seconds."""
        self.figures[key] = {"unit": unit, **_spread(seconds)}

    def value(self, key: str, number: float, unit: str) -> None:
        """Add one number that has no spread, such as a count of bytes."""
        self.figure(key, [number], unit)

    def ratio(
        self, key: str, ours: Sequence[float], theirs: Sequence[float], of: str = ""
    ) -> float:
        """Add our time over theirs, and return it: the median over the pairs.

        The measurements at one position were taken one right after the other, so whatever slowed
        the machine then slowed both, and their ratio says more than the ratio of two medians. `of`
        says which of several ways are compared.
        """
        if len(ours) != len(theirs):
            raise ValueError(f"{key}: {len(ours)} measurements of ours and {len(theirs)} of theirs")
        self.ratios[key] = _spread([a / b for a, b in zip(ours, theirs, strict=True)])
        if of:
            self.ratios[key]["of"] = of
        return float(self.ratios[key]["median"])

    def show(self) -> None:
        """Print what was added since this was called before."""
        if self._shown is None:
            self._shown = set()
            print(f"== {self.name}")
            print(f"machine   {describe(machine())}")
            print("versions  " + ", ".join(f"{k} {v}" for k, v in versions().items()))
        figures = [key for key in self.figures if key not in self._shown]
        ratios = [key for key in self.ratios if f"/{key}" not in self._shown]
        width = max(map(len, [*figures, *ratios]), default=0)
        for key in figures:
            print(f"{key:<{width}}  {_line(self.figures[key], scale(self.figures[key]))}")
        for key in ratios:
            of = self.ratios[key].get("of")
            line = _line(self.ratios[key], (1.0, "times the rival"))
            print(f"{key:<{width}}  {line}{f', {of}' if of else ''}")
        self._shown |= {*figures, *(f"/{key}" for key in ratios)}
        sys.stdout.flush()

    def finish(self, json_path: str | Path | None = None) -> dict[str, Any]:
        """Print everything; write it as JSON if there is a path; return what was written."""
        self.show()
        results = {
            "name": self.name,
            "machine": machine(),
            "versions": versions(),
            "figures": self.figures,
            "ratios": self.ratios,
        }
        if json_path is not None:
            Path(json_path).write_text(json.dumps(results, indent=2) + "\n")
        return results


def machine() -> dict[str, Any]:
    """What a reader has to know of the machine to read the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "os": platform.platform(terse=True),
    }


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    memory = machine["memory_gib"]
    shown = "unknown memory" if memory is None else f"{memory:.0f} GiB"
    return f"{machine['cpu']}, {machine['cores']} cores, {shown}, {machine['os']}"


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def scale(figure: dict[str, Any]) -> tuple[float, str]:
    """The factor and the unit in which a figure reads well: 0.0021 s as 2.1 ms."""
    if figure["unit"] != "s" or figure["median"] >= 1:
        return 1.0, figure["unit"]
    return (1e3, "ms") if figure["median"] >= 1e-3 else (1e6, "us")


def _line(spread: dict[str, Any], shown: tuple[float, str]) -> str:
    factor, unit = shown
    median, low, high = (f"{spread[k] * factor:.4g}" for k in ("median", "min", "max"))
    if spread["n"] == 1:
        return f"{median} {unit}"
    return f"{median} {unit} ({low} to {high}, n={spread['n']})"


def _spread(numbers: Sequence[float]) -> dict[str, Any]:
    numbers = [float(n) for n in numbers]
    return {
        "median": statistics.median(numbers),
        "min": min(numbers),
        "max": max(numbers),
        "n": len(numbers),
        "all": numbers,
    }


def _cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None
