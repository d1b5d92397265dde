"""Draw the schedules on the training page: python docs/schedules.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from taskgrad.plan.rules import schedule
from taskgrad.plan.schedule import Costs, Pipeline, Schedule

PICTURE = Path(__file__).parent / "images" / "schedules.png"
WORKERS, MICROBATCHES = 3, 6
# Stages in a line: one a worker, two a worker round them, two a worker there and back.
LINE = tuple(range(WORKERS))
DRAWN = {
    "gpipe": LINE,
    "1f1b": LINE,
    "interleaved_1f1b": LINE + LINE,
    "zb_h1": LINE,
    "zb_h2": LINE,
    "zb_v": LINE + LINE[::-1],
}
COLOURS = {"F": "#4c9be8", "B": "#f2a541", "W": "#6fbf73"}
SECOND = {"F": "#8fc1f2", "B": "#f8cd93", "W": "#a9d9ab"}  # a worker's second stage


def draw(axes: Axes, found: Schedule) -> None:
    """The actions of every worker over time, on a grey ground, as each starts when it can."""
    stages = len(found.pipeline.workers)
    each = WORKERS / stages  # all layers together take as long in every schedule
    timeline = found.timeline(Costs.uniform(stages, each, each, each))
    for worker, row in enumerate(timeline.rows):
        for (kind, stage, microbatch), start, end in row:
            colours = COLOURS if stage < WORKERS else SECOND
            axes.barh(
                worker,
                end - start,
                left=start,
                height=0.9,
                color=colours[kind],
                edgecolor="white",
            )
            axes.text(
                (start + end) / 2, worker, microbatch, ha="center", va="center", fontsize="small"
            )
    axes.set_facecolor("#e8e8e8")
    tapes = [
        f"worker {worker}: {each * n:g} tape{'s' * (each * n != 1)}"
        for worker, n in enumerate(found.peak_tapes())
    ]
    axes.set_yticks(range(WORKERS), tapes)
    axes.set_xticks([])
    axes.set_xlim(0, timeline.duration)
    axes.set_title(f"{found.name}: bubble {timeline.bubble():.0%}", loc="left", fontsize="medium")
    axes.invert_yaxis()


def main() -> None:
    """Draw all schedules, one below the other, on one scale of time."""
    figure, every = plt.subplots(len(DRAWN), figsize=(9, 10), layout="constrained", sharex=True)
    for axes, (name, workers) in zip(every, DRAWN.items(), strict=True):
        pipeline = Pipeline(workers, Pipeline.line(len(workers)).needs)
        draw(axes, schedule(name, pipeline, MICROBATCHES))
    every[0].set_xlim(0, 3 * (MICROBATCHES + WORKERS - 1))
    every[-1].set_xlabel("time")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
