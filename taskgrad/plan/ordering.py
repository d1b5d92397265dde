"""Make a schedule from a rule: simulate a step in which each worker does what its rule prefers.

Of the actions that are ready a worker takes the one that the rule prefers, among those that its
limits allow. So every schedule can be carried out, whatever the graph: skips, branches, several
stages on one worker. In all of them microbatches pass each stage in ascending order, forward (F),
backward (B) and in the backward for weights (W): gradients are summed in the order of plain torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from taskgrad.plan.schedule import Action, Costs, Kind, Pipeline

Key = Callable[[Action], tuple[int, ...]]
"""What ready actions are compared by: the least is taken."""


@dataclass(frozen=True)
class Rule:
    """The rule by which a schedule is made, for one pipeline and number of microbatches.

    All limits are at least 1. Then those of stages never hold back the oldest microbatch, so that
    any graph can be carried out. One of a worker, and `in_turn`, can: that of w stages whose
    forwards come in groups of g microbatches has to be at least wg, unless the graph is known.

    Attributes
    ----------
    key
        What the actions that are ready are compared by.
    in_flight
        For each stage, how many microbatches may be between F and B there; None for any number.
    tapes
        For each stage, how many may be between F and W; None if the schedule has no W, and B is for
        inputs and weights.
    in_flight_on_worker
        For each worker, how many may be between F and B at all of its stages together; None for any
        number.
    in_turn
        True if a worker's forwards come in the order of `key`, and so do its backwards: it waits
        for the next one rather than take another one that is ready.
    flush
        True if a worker's first B waits for its last F.
    """

    key: Key
    in_flight: tuple[int, ...] | None = None
    tapes: tuple[int, ...] | None = None
    in_flight_on_worker: tuple[int, ...] | None = None
    in_turn: bool = False
    flush: bool = False


def oldest_first(kinds: str) -> Key:
    """Compare by kind, in this order; of a kind by microbatch, then the stage furthest on."""
    return lambda action: (kinds.index(action.kind), action.microbatch, -action.stage)


def carry_out(
    rule: Rule, pipeline: Pipeline, microbatches: int, costs: Costs | None = None
) -> tuple[tuple[Action, ...], ...]:
    """Each worker's order of actions in a simulated step.

    Without `costs` each of F, B and W takes one unit of time, at every stage.

    Raises
    ------
    ValueError
        At some time nothing can run: stages need each other, or the rule holds back what all
        others wait for.
    """
    step = _Step(rule, pipeline, microbatches, costs or Costs.uniform(len(pipeline.workers)))
    # Times at which an action of a worker may have become ready: it, or one that it needs, ended.
    times = [(0.0, worker) for worker in range(len(step.orders))]
    while times:
        now, worker = heapq.heappop(times)
        for end, other in step.advance(worker, now):
            heapq.heappush(times, (end, other))
    if any(len(order) < step.total(worker) for worker, order in enumerate(step.orders)):
        raise ValueError(
            f"nothing can run: the stages of {pipeline} need each other, or its limits are too low"
        )
    return tuple(map(tuple, step.orders))


class _Step:
    """A simulated step: what each worker has done, and until when it is busy."""

    def __init__(self, rule: Rule, pipeline: Pipeline, microbatches: int, costs: Costs) -> None:
        self._rule, self._pipeline, self._costs = rule, pipeline, costs
        self._microbatches = microbatches
        self._users, self._stages = pipeline.users, pipeline.stages_of
        self._split = rule.tapes is not None
        self._busy_until = [0.0] * len(self._stages)
        self._end: dict[Action, float] = {}
        # The next microbatch of each kind, at each stage.
        self._f, self._b, self._w = ([0] * len(pipeline.workers) for _ in range(3))
        self.orders: list[list[Action]] = [[] for _ in self._stages]

    def total(self, worker: int) -> int:
        """How many actions the worker has in a step."""
        return len(self._stages[worker]) * self._microbatches * (3 if self._split else 2)

    def advance(self, worker: int, now: float) -> list[tuple[float, int]]:
        """Start an action on the worker, if it is idle and one is ready.

        Returns (time, worker) of when its result is where it is used.
        """
        if self._busy_until[worker] > now:
            return []
        action = min(self._ready(worker, now), key=self._rule.key, default=None)
        if action is None:
            return []
        end = now + self._costs.of(action, self._split)
        self.orders[worker].append(action)
        self._busy_until[worker] = self._end[action] = end
        next_of = {"F": self._f, "B": self._b}.get(action.kind, self._w)
        next_of[action.stage] += 1
        users = {"F": self._users, "B": self._pipeline.needs}.get(action.kind)
        workers = {self._pipeline.workers[user] for user in users[action.stage]} if users else set()
        return [(end, worker), *((end + self._costs.latency, w) for w in workers - {worker})]

    def _ready(self, worker: int, now: float) -> Iterator[Action]:
        stages = self._stages[worker]
        forwards = self._next("F", self._f, stages)
        for forward in forwards:
            needs = self._pipeline.needs[forward.stage]
            if self._allows(forward, worker) and self._has("F", needs, forward, worker, now):
                yield forward
        for backward in self._next("B", self._b, stages):
            if backward.microbatch >= self._f[backward.stage] or (self._rule.flush and forwards):
                continue
            if self._has("B", self._users[backward.stage], backward, worker, now):
                yield backward
        for stage in stages if self._split else ():
            if self._w[stage] < self._b[stage]:
                yield Action("W", stage, self._w[stage])

    def _next(self, kind: Kind, next_of: list[int], stages: tuple[int, ...]) -> list[Action]:
        """The next action of this kind at each stage, or only the one whose turn it is."""
        found = [Action(kind, s, next_of[s]) for s in stages if next_of[s] < self._microbatches]
        return [min(found, key=self._rule.key)] if found and self._rule.in_turn else found

    def _allows(self, forward: Action, worker: int) -> bool:
        """True if the limits of the rule allow this forward."""
        rule, (_, stage, microbatch) = self._rule, forward
        if rule.in_flight is not None and microbatch - self._b[stage] >= rule.in_flight[stage]:
            return False
        if rule.tapes is not None and microbatch - self._w[stage] >= rule.tapes[stage]:
            return False
        if rule.in_flight_on_worker is None:
            return True
        held = sum(self._f[s] - self._b[s] for s in self._stages[worker])
        return held < rule.in_flight_on_worker[worker]

    def _has(
        self, kind: Kind, stages: tuple[int, ...], action: Action, worker: int, now: float
    ) -> bool:
        """True if the worker has what these stages made of the microbatch."""
        for stage in stages:
            end = self._end.get(action._replace(kind=kind, stage=stage))
            away = self._pipeline.workers[stage] != worker
            if end is None or end + (self._costs.latency if away else 0.0) > now:
                return False
        return True
