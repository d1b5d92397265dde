"""Draw the schedules on the training page: python docs/schedules.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from taskgrad.plan.schedule import Pipeline, Schedule, schedule

PICTURE = Path(__file__).parent / "images" / "schedules.png"
WORKERS, MICROBATCHES = 3, 6
LENGTHS = {"F": 1, "B": 2}
COLOURS = {"F": "#4c9be8", "B": "#f2a541"}


def draw(axes: Axes, found: Schedule) -> None:
    """The actions of every worker over time, on a grey ground, as each starts when it can."""
    orders = [list(order) for order in found.orders]
    free = [0] * len(orders)
    ends: dict[tuple[str, int, int], int] = {}
    while any(orders):
        for worker, order in enumerate(orders):
            if not order:
                continue
            kind, stage, microbatch = order[0]
            # A forward needs that of the stage before, a backward that of the stage after.
            needs = (kind, stage - 1 if kind == "F" else stage + 1, microbatch)
            if 0 <= needs[1] < len(orders) and needs not in ends:
                continue
            order.pop(0)
            start, length = max(free[worker], ends.get(needs, 0)), LENGTHS[kind]
            ends[kind, stage, microbatch] = free[worker] = start + length
            axes.barh(
                worker, length, left=start, height=0.9, color=COLOURS[kind], edgecolor="white"
            )
            axes.text(start + length / 2, worker, f"{kind}{microbatch}", ha="center", va="center")
    axes.set_facecolor("#e8e8e8")
    tapes = [
        f"worker {i}: {n} tape{'s' * (n > 1)} at most" for i, n in enumerate(found.peak_tapes())
    ]
    axes.set_yticks(range(len(free)), tapes)
    axes.set_xticks([])
    axes.set(title=found.name, xlim=(0, max(free)))
    axes.invert_yaxis()


def main() -> None:
    """Draw GPipe above 1F1B."""
    figure, both = plt.subplots(2, figsize=(9, 4.2), layout="constrained")
    for axes, name in zip(both, ("gpipe", "1f1b"), strict=True):
        draw(axes, schedule(name, Pipeline.line(WORKERS), MICROBATCHES))
    both[-1].set_xlabel("time")
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
