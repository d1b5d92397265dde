"""Draw the plot of the page on scale: python docs/scale.py [runs/benchmarks/scale.json]

From what ``python -m benchmarks.scale --json PATH simulated`` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "benchmarks" / "scale.json"
PICTURE = ROOT / "docs" / "images" / "scale.png"
WORKERS = (2, 4, 16, 64, 256, 1024)
COLOURS = {"1f1b": "#f2a541", "zb_h1": "#4c9be8", "zb_h2": "#6fbf73"}
LINKS = {
    "10gbit": (":", "10 Gbit/s Ethernet"),
    "100gbit": ("--", "100 Gbit/s Ethernet"),
    "nvlink4": ("-", "NVLink 4"),
}


def prepare(axes: Axes, title: str) -> None:
    """Workers from left to right, bubbles from bottom to top."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(WORKERS, [f"{n:,}" for n in WORKERS])
    axes.set_xlabel("workers")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw what the file on the command line has."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    figures = {k: v["median"] for k, v in json.loads(path.read_text())["figures"].items()}
    figure, (many, fixed) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    prepare(many, "two microbatches for each worker")
    prepare(fixed, "64 microbatches, 100 Gbit/s")
    for name, colour in COLOURS.items():
        for link, (style, _) in LINKS.items():
            bubbles = [figures[f"bubble_{name}_{link}_{n}"] for n in WORKERS]
            many.plot(WORKERS, bubbles, style, color=colour)
        bubbles = [figures[f"bubble_{name}_100gbit_{n}_64_microbatches"] for n in WORKERS]
        fixed.plot(WORKERS, bubbles, "--", color=colour, label=name)
    many.set_ylabel("bubble")
    styles = [plt.Line2D([], [], color="black", linestyle=style) for style, _ in LINKS.values()]
    many.legend(styles, [label for _, label in LINKS.values()], loc="upper left")
    fixed.legend(loc="upper left")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
