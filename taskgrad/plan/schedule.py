"""Schedules: the order of each worker's actions in one training step, as plain data.

A pipeline is a graph of stages, each on a worker. A step takes every microbatch forward and
backward through all of them; a schedule fixes for each worker the order of those actions. From
that follows what it needs: how many tapes a worker holds, and, given what the actions cost, when
each of them runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W", "BW", "U"]
"""What an action does.

F
    Forward of a stage for a microbatch.
B
    Its backward: for the inputs alone if the schedule has a W for the same stage and microbatch,
    else for inputs and weights at once.
W
    Its backward for the weights, any time after B.
BW
    Its backward for inputs and weights at once, explicitly; as plans write it.
U
    The update of all that a worker holds, at the end of a step; in plans only.
"""


class Action(NamedTuple):
    """A microbatch through one stage, forward or backward; or an update (U)."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return "U" if self.kind == "U" else f"{self.kind}{self.stage}.{self.microbatch}"


UPDATE = Action("U", -1, -1)
"""The update of all stages of a worker: of no single stage or microbatch."""


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which they can run.

    Attributes
    ----------
    workers
        The worker of each stage, counted from 0.
    needs
        For each stage those before it whose outputs it takes.
    """

    workers: tuple[int, ...]
    needs: tuple[tuple[int, ...], ...]

    @classmethod
    def line(cls, stages: int) -> Pipeline:
        """Stages one after the other, each on a worker of its own."""
        return cls(tuple(range(stages)), tuple((i - 1,) if i else () for i in range(stages)))

    @property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each stage those that take its output."""
        found: list[list[int]] = [[] for _ in self.workers]
        for user, needs in enumerate(self.needs):
            for stage in dict.fromkeys(needs):
                found[stage].append(user)
        return tuple(map(tuple, found))

    @property
    def to_end(self) -> tuple[int, ...]:
        """For each stage the length of the longest path from it to an end, in stages.

        It counts the stage itself: 4, 3, 2, 1 for a line of four.
        """
        lengths = [1] * len(self.workers)
        for stage, users in reversed(list(enumerate(self.users))):
            lengths[stage] += max((lengths[user] for user in users), default=0)
        return tuple(lengths)

    @property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """For each worker its stages."""
        return tuple(
            tuple(stage for stage, at in enumerate(self.workers) if at == worker)
            for worker in range(max(self.workers) + 1)
        )


@dataclass(frozen=True)
class Costs:
    """The time that each action takes, by stage, in any unit.

    Attributes
    ----------
    forward, backward, weight
        Of F, B and W for each stage. `backward` is for the inputs alone: a backward for inputs and
        weights at once takes `backward` and `weight`.
    latency
        From the end of an action until another worker has its result.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    latency: float = 0.0

    @classmethod
    def uniform(
        cls,
        stages: int,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        latency: float = 0.0,
    ) -> Costs:
        """The same costs for every stage; by default one unit for each of F, B and W."""
        return cls((forward,) * stages, (backward,) * stages, (weight,) * stages, latency)

    def of(self, action: Action, split: bool) -> float:
        """The time of one action; `split` says whether the same backward has a W."""
        stage = action.stage
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "W":
            return self.weight[stage]
        return self.backward[stage] + (0.0 if split else self.weight[stage])


class Span(NamedTuple):
    """An action, and when it starts and ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each action of a step runs: for every worker its spans, in order.

    Examples
    --------
    >>> from taskgrad.plan.rules import schedule
    >>> found = schedule("1f1b", Pipeline.line(2), 3).timeline(Costs.uniform(2))
    >>> print(found.drawing())
    0: F0 F1 .. .. B0 -- F2 B1 -- .. B2 --
    1: .. F0 B0 -- F1 B1 -- F2 B2 -- .. ..
    >>> found.duration
    12.0
    """

    rows: tuple[tuple[Span, ...], ...]

    @property
    def duration(self) -> float:
        """From the first start to the last end."""
        rows = [row for row in self.rows if row]
        return max(row[-1].end for row in rows) - min(row[0].start for row in rows)

    @property
    def period(self) -> float:
        """From one step to the next where no step waits for the end of the one before.

        It is the longest that a worker takes from its first action to the end of its last: each
        worker starts the next step when it is done with this one.
        """
        return max(row[-1].end - row[0].start for row in self.rows if row)

    def bubble(self, flush: bool = False) -> float:
        """The share of all workers' time that is idle, between 0 and 1.

        Of the `period`, as in the zero-bubble papers; with `flush` of the `duration`: the next step
        then starts when all workers are done with this one.
        """
        rows = [row for row in self.rows if row]
        busy = sum(span.end - span.start for row in rows for span in row)
        total = len(rows) * (self.duration if flush else self.period)
        return (total - busy) / total if total else 0.0

    def drawing(self, unit: float = 1.0) -> str:
        """A line of text for each worker, with a column for each `unit` of time.

        An action is named by its kind and microbatch, and by its stage too where a worker has
        several of them; it goes on with ``--``.
        """
        several = any(len({span.action.stage for span in row}) > 1 for row in self.rows)
        lines = []
        for row in self.rows:
            cells: list[str] = []
            for (kind, stage, microbatch), start, end in row:
                cells += [".."] * (round(start / unit) - len(cells))
                name = f"{kind}{stage}.{microbatch}" if several else f"{kind}{microbatch}"
                cells += [name, *["--"] * (round(end / unit) - len(cells) - 1)]
            lines.append(cells)
        columns = max(map(len, lines))
        width = max(len(cell) for cells in lines for cell in cells)
        for cells in lines:
            cells += [".."] * (columns - len(cells))
        return "\n".join(
            f"{worker}: {' '.join(cell.ljust(width) for cell in cells)}".rstrip()
            for worker, cells in enumerate(lines)
        )


@dataclass(frozen=True)
class Schedule:
    """For every worker the order of its actions in one step.

    Examples
    --------
    >>> from taskgrad.plan.rules import schedule
    >>> print(schedule("1f1b", Pipeline.line(2), 3))
    0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
    1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    """

    name: str
    pipeline: Pipeline
    microbatches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def split(self) -> frozenset[tuple[int, int]]:
        """The (stage, microbatch) of each backward whose part for the weights is a W."""
        return frozenset(a[1:] for order in self.orders for a in order if a.kind == "W")

    def first(self, microbatches: int) -> Schedule:
        """The schedule of so many microbatches, the first ones, in the same order."""
        orders = tuple([tuple([a for a in o if a.microbatch < microbatches]) for o in self.orders])
        return Schedule(self.name, self.pipeline, microbatches, orders)

    def peak_tapes(self) -> tuple[int, ...]:
        """The most tapes that each worker holds at a time.

        A tape is used up by W where there is one, else by the backward for inputs and weights. A
        stage with nothing to train counts as the others do, though it leaves no tapes.
        """
        split = self.split
        peaks = []
        for order in self.orders:
            held = peak = 0
            for action in order:
                if action.kind == "F":
                    held += 1
                elif action.kind != "B" or action[1:] not in split:
                    held -= 1
                peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)

    def timeline(self, costs: Costs) -> Timeline:
        """When each action runs if it takes the time that `costs` gives it.

        Each worker takes its actions in order, and each as soon as what it needs is there; values
        travel while workers compute.

        Raises
        ------
        ValueError
            The costs are of another number of stages, or the schedule cannot be carried out.
        """
        stages = len(self.pipeline.workers)
        for given in (costs.forward, costs.backward, costs.weight):
            if len(given) != stages:
                raise ValueError(f"there are costs of {len(given)} stages, and {stages} stages")
        split, at, microbatches = self.split, self.pipeline.workers, self.microbatches
        ends = [0.0] * (_KINDS * stages * microbatches)
        rows: list[list[Span]] = [[] for _ in self.orders]
        free = [0.0] * len(self.orders)
        for worker, action, index, before in _run_order(self):
            start = free[worker]
            for other in before:
                end = ends[other]
                if at[other // microbatches % stages] != worker:
                    end += costs.latency
                if end > start:
                    start = end
            end = start + costs.of(action, action.kind == "B" and action[1:] in split)
            rows[worker].append(Span(action, start, end))
            ends[index] = free[worker] = end
        return Timeline(tuple(map(tuple, rows)))

    def bubble(self, costs: Costs, flush: bool = False) -> float:
        """The share of all workers' time that is idle in a simulated step: `Timeline.bubble`.

        Examples
        --------
        >>> from taskgrad.plan.rules import schedule
        >>> schedule("1f1b", Pipeline.line(2), 4).bubble(Costs.uniform(2))
        0.2
        >>> schedule("zb_h2", Pipeline.line(2), 4).bubble(Costs.uniform(2))
        0.0
        """
        return self.timeline(costs).bubble(flush)

    def __str__(self) -> str:
        return "\n".join(
            f"{worker}: {' '.join(map(str, order))}" for worker, order in enumerate(self.orders)
        )


def check(found: Schedule) -> None:
    """Raise unless every action occurs once, and the orders can be executed together.

    For schedules that no rule of `taskgrad.plan.rules` made.

    Raises
    ------
    ValueError
        The message names the action that is missing, repeated, on the wrong worker, or never ready.
    """
    pipeline = found.pipeline
    split = found.split
    wanted: set[Action] = {
        Action(kind, stage, m)
        for stage in range(len(pipeline.workers))
        for m in range(found.microbatches)
        for kind in _kinds((stage, m) in split)
    }
    for worker, order in enumerate(found.orders):
        for given in order:
            action = _either(given) if given[1:] not in split else given
            if action not in wanted:
                raise ValueError(f"action {given} of worker {worker} is unknown, or stands twice")
            wanted.remove(action)
            if pipeline.workers[action.stage] != worker:
                raise ValueError(f"action {given} stands in the order of worker {worker}")
    if wanted:
        raise ValueError(f"action {min(wanted)} is missing")
    for _ in _run_order(found):
        pass


def _kinds(split: bool) -> tuple[Kind, ...]:
    return ("F", "B", "W") if split else ("F", "B")


def _run_order(found: Schedule) -> Iterator[tuple[int, Action, int, list[int]]]:
    """All actions, each with its worker, its index, and those of the actions that it needs.

    Every action comes after those that it needs. An index is (kind x stages + stage) x microbatches
    + microbatch. ValueError if workers wait for each other.
    """
    stages, microbatches = len(found.pipeline.workers), found.microbatches
    needs = _needs(found.pipeline)
    done = bytearray(_KINDS * stages * microbatches)
    at = [0] * len(found.orders)
    moved = True
    while moved:
        moved = False
        for worker, order in enumerate(found.orders):
            while at[worker] < len(order):
                action = order[at[worker]]
                kind, stage, m = action
                row = _ROW[kind] * stages + stage
                before = [other * microbatches + m for other in needs[row]]
                if 0 in map(done.__getitem__, before):
                    break
                index = row * microbatches + m
                done[index] = True
                at[worker] += 1
                moved = True
                yield worker, action, index, before
    stuck = [str(o[i]) for i, o in zip(at, found.orders, strict=True) if i < len(o)]
    if stuck:
        raise ValueError(f"this schedule waits for ever at {', '.join(stuck)}")


def _either(action: Action) -> Action:
    """B for BW: which backward it is matters to no other action."""
    return action._replace(kind="B") if action.kind == "BW" else action


# The place of each kind in an index of actions. Which backward it is matters to no other action.
_ROW = {"F": 0, "B": 1, "BW": 1, "W": 2}
_KINDS = 3


def _needs(pipeline: Pipeline) -> list[list[int]]:
    """For each kind and stage (kind x stages + stage) those of the actions that it needs."""
    n, users = len(pipeline.workers), pipeline.users
    forwards = [list(dict.fromkeys(needs)) for needs in pipeline.needs]
    backwards = [[stage, *(n + user for user in users[stage])] for stage in range(n)]
    return forwards + backwards + [[n + stage] for stage in range(n)]
