"""Make a schedule from a rule: simulate a step in which each worker does what its rule prefers.

Of the actions that are ready a worker takes the one that the rule prefers, among those that its
limits allow. So every schedule can be carried out, whatever the graph: skips, branches, several
stages on one worker. In all of them microbatches pass each stage in ascending order, forward (F),
backward (B) and in the backward for weights (W): gradients are summed in the order of plain torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
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
        # When actions end, of each kind at each stage, by microbatch: the next one is not there.
        self._ends: dict[str, list[list[float]]] = {
            kind: [[] for _ in pipeline.workers] for kind in "FBW"
        }
        # For each kind and stage: when the actions of other stages that it takes from end, each
        # with the time until its worker has the result; and the workers that take its own.
        before = {"F": pipeline.needs, "B": self._users}
        after = {"F": self._users, "B": pipeline.needs, "W": ((),) * len(pipeline.workers)}
        at, latency = pipeline.workers, costs.latency
        self._before = {
            kind: [
                [(self._ends[kind][s], 0.0 if at[s] == at[stage] else latency) for s in others]
                for stage, others in enumerate(of_stage)
            ]
            for kind, of_stage in before.items()
        }
        self._takers = {
            kind: [{at[s] for s in others} - {at[stage]} for stage, others in enumerate(of_stage)]
            for kind, of_stage in after.items()
        }
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
        ready = self._ready(worker, now)
        if not ready:
            return []
        action = min(ready, key=self._rule.key) if len(ready) > 1 else ready[0]
        end = now + self._costs.of(action, self._split)
        self.orders[worker].append(action)
        self._busy_until[worker] = end
        self._ends[action.kind][action.stage].append(end)
        there = end + self._costs.latency
        return [(end, worker), *((there, w) for w in self._takers[action.kind][action.stage])]

    def _ready(self, worker: int, now: float) -> list[Action]:
        stages, (f, b, w) = self._stages[worker], self._ends.values()
        ready = []
        forwards = self._next("F", stages)
        for forward in forwards:
            if self._has(forward, now) and self._allows(forward, worker):
                ready.append(forward)
        for backward in self._next("B", stages):
            if backward.microbatch < len(f[backward.stage]) and self._has(backward, now):
                ready.append(backward)
        if self._rule.flush and forwards:
            ready = [action for action in ready if action.kind == "F"]
        if self._split:
            ready += [Action("W", s, len(w[s])) for s in stages if len(w[s]) < len(b[s])]
        return ready

    def _next(self, kind: Kind, stages: tuple[int, ...]) -> list[Action]:
        """The next action of this kind at each stage, or only the one whose turn it is."""
        ends = self._ends[kind]
        found = [Action(kind, s, len(ends[s])) for s in stages if len(ends[s]) < self._microbatches]
        return [min(found, key=self._rule.key)] if found and self._rule.in_turn else found

    def _allows(self, forward: Action, worker: int) -> bool:
        """True if the limits of the rule allow this forward."""
        rule, (_, stage, microbatch) = self._rule, forward
        f, b, w = self._ends.values()
        if rule.in_flight is not None and microbatch - len(b[stage]) >= rule.in_flight[stage]:
            return False
        if rule.tapes is not None and microbatch - len(w[stage]) >= rule.tapes[stage]:
            return False
        if rule.in_flight_on_worker is None:
            return True
        held = sum(len(f[s]) - len(b[s]) for s in self._stages[worker])
        return held < rule.in_flight_on_worker[worker]

    def _has(self, action: Action, now: float) -> bool:
        """True if the worker has what the action takes from other stages."""
        kind, stage, microbatch = action
        for ends, delay in self._before[kind][stage]:
            if len(ends) <= microbatch or ends[microbatch] + delay > now:
                return False
        return True
