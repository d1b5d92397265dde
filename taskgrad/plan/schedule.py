"""Schedules: the order of each worker's actions in one training step, as plain data.

A pipeline is a graph of stages, each on a worker. A step takes every microbatch forward and
backward through all of them; a schedule fixes for each worker the order of those actions. It is
made by simulating a step with nominal costs: of the actions that are ready each worker takes the
one that its rule prefers. So every schedule can be carried out, whatever the graph: skips,
branches, several stages on one worker.

References: GPipe (Huang et al., 2019); 1F1B, PipeDream-Flush (Narayanan et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W", "BW", "U"]
"""What an action does.

F
    Forward of a stage for a microbatch.
B
    Its backward: for the inputs alone if the schedule has a W for the same stage and microbatch,
    else for inputs and weights at once.
W
    Its backward for the weights, any time after B. No executor runs it yet.
BW
    Its backward for inputs and weights at once, explicitly; as plans write it.
U
    The update of all that a worker holds, at the end of a step; in plans only.
"""
# Nominal costs in a simulated step: a backward does about twice the work of its forward.
_COSTS: dict[Kind, int] = {"F": 1, "B": 2}


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
        return tuple(
            tuple(user for user, needs in enumerate(self.needs) if stage in needs)
            for stage in range(len(self.workers))
        )


@dataclass(frozen=True)
class Schedule:
    """For every worker the order of its actions in one step.

    Examples
    --------
    >>> print(schedule("1f1b", Pipeline.line(2), 3))
    0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
    1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    """

    name: str
    pipeline: Pipeline
    microbatches: int
    orders: tuple[tuple[Action, ...], ...]

    def peak_tapes(self) -> tuple[int, ...]:
        """The most tapes that each worker holds at a time."""
        split = {a[1:] for order in self.orders for a in order if a.kind == "W"}
        peaks = []
        for order in self.orders:
            held = peak = 0
            for action in order:
                if action.kind == "F":
                    held += 1
                elif action.kind != "B" or action[1:] not in split:
                    held -= 1  # a tape is used up by W where there is one
                peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)

    def __str__(self) -> str:
        return "\n".join(
            f"{worker}: {' '.join(map(str, order))}" for worker, order in enumerate(self.orders)
        )


class _Rule(NamedTuple):
    """The rule by which a schedule is made."""

    prefers: Kind
    """The kind of action that a worker does first if both are ready."""
    limit: Callable[[int, int, int], int]
    """(stage, stages, microbatches): how many microbatches may be between F and B there."""
    flush: bool
    """True if a worker's first B waits for its last F."""


_RULES = {
    "gpipe": _Rule("F", lambda stage, stages, microbatches: microbatches, flush=True),
    "1f1b": _Rule("B", lambda stage, stages, microbatches: stages - stage, flush=False),
}
NAMES = tuple(_RULES)


@lru_cache(maxsize=64)
def schedule(name: str, pipeline: Pipeline, microbatches: int) -> Schedule:
    """The schedule of this name.

    ``"gpipe"`` takes all microbatches forward, then all backward: simple, with a tape for each of
    them. ``"1f1b"`` takes one backward as soon as there is one: stage i of n holds n - i tapes at
    most. In both, microbatches pass each stage in ascending order, forward and backward; gradients
    are summed in the order of plain torch.

    Raises
    ------
    ValueError
        There is no such schedule, there are no microbatches, or stages need each other.
    """
    if name not in _RULES:
        raise ValueError(f"there is no schedule {name!r}; there are {', '.join(map(repr, NAMES))}")
    if microbatches < 1:
        raise ValueError(f"a step has at least one microbatch; got {microbatches}")
    return Schedule(name, pipeline, microbatches, _carry_out(_RULES[name], pipeline, microbatches))


def _carry_out(
    rule: _Rule, pipeline: Pipeline, microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Simulate a step with nominal costs; returns each worker's order of actions."""
    stages = len(pipeline.workers)
    users = pipeline.users
    orders: list[list[Action]] = [[] for _ in range(max(pipeline.workers) + 1)]
    busy_until = [0] * len(orders)
    done_at: dict[Action, int] = {}
    next_of = {kind: [0] * stages for kind in _COSTS}

    def ready(worker: int, now: int) -> Iterator[Action]:
        mine = [s for s in range(stages) if pipeline.workers[s] == worker]
        flushed = all(next_of["F"][s] == microbatches for s in mine)
        for stage in mine:
            f, b = next_of["F"][stage], next_of["B"][stage]
            before = (Action("F", s, f) for s in pipeline.needs[stage])
            if (
                f < microbatches
                and f - b < rule.limit(stage, stages, microbatches)
                and _done(before, done_at, now)
            ):
                yield Action("F", stage, f)
            after = (Action("B", s, b) for s in users[stage])
            if b < f and (flushed or not rule.flush) and _done(after, done_at, now):
                yield Action("B", stage, b)

    now, left = 0, 2 * stages * microbatches
    while left:
        for worker, order in enumerate(orders):
            if busy_until[worker] > now:
                continue
            # Of equals the oldest microbatch, and of that the stage furthest on.
            chosen = min(
                ready(worker, now),
                key=lambda a: (a.kind != rule.prefers, a.microbatch, -a.stage),
                default=None,
            )
            if chosen is not None:
                order.append(chosen)
                done_at[chosen] = busy_until[worker] = now + _COSTS[chosen.kind]
                next_of[chosen.kind][chosen.stage] += 1
                left -= 1
        if left and max(busy_until) <= now:
            raise ValueError(f"nothing can run: the stages of {pipeline} need each other")
        now += 1
    return tuple(map(tuple, orders))


def _done(actions: Iterator[Action], done_at: dict[Action, int], now: int) -> bool:
    return all(done_at.get(action, now + 1) <= now for action in actions)


def check(found: Schedule) -> None:
    """Raise unless every action occurs once, and the orders can be executed together.

    For schedules that `schedule` did not make.

    Raises
    ------
    ValueError
        The message names the action that is missing, repeated, on the wrong worker, or never ready.
    """
    pipeline = found.pipeline
    split = {a[1:] for order in found.orders for a in order if a.kind == "W"}
    wanted: set[Action] = {
        Action(kind, stage, m)
        for stage in range(len(pipeline.workers))
        for m in range(found.microbatches)
        for kind in (*_COSTS, *(("W",) if (stage, m) in split else ()))
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
    users = pipeline.users
    done: set[Action] = set()
    at = [0] * len(found.orders)
    while any(i < len(order) for i, order in zip(at, found.orders, strict=True)):
        moved = False
        for worker, order in enumerate(found.orders):
            while at[worker] < len(order) and _before(order[at[worker]], pipeline, users) <= done:
                done.add(_either(order[at[worker]]))
                at[worker] += 1
                moved = True
        if not moved:
            stuck = [str(o[i]) for i, o in zip(at, found.orders, strict=True) if i < len(o)]
            raise ValueError(f"this schedule waits for ever at {', '.join(stuck)}")


def _either(action: Action) -> Action:
    """B for BW: which backward it is matters to no other action."""
    return action._replace(kind="B") if action.kind == "BW" else action


def _before(action: Action, pipeline: Pipeline, users: Sequence[Sequence[int]]) -> set[Action]:
    kind, stage, m = action
    if kind == "F":
        return {Action("F", s, m) for s in pipeline.needs[stage]}
    if kind == "W":
        return {Action("B", stage, m)}
    return {Action("F", stage, m), *(Action("B", s, m) for s in users[stage])}
