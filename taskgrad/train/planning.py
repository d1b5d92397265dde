"""The plan of a trainer's steps, made of the layout of its chain and of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial

import torch

from taskgrad.arguments import shown
from taskgrad.graph.adjoint import calls_behind
from taskgrad.graph.layer_graph import FUNCTION
from taskgrad.graph.nodes import Node, whole
from taskgrad.layout import Layout, Select
from taskgrad.plan.plan import Plan, PlannedWorker, Stage
from taskgrad.plan.rules import NAMES, fastest
from taskgrad.plan.rules import schedule as named_schedule
from taskgrad.plan.schedule import Costs, Pipeline, Schedule, check
from taskgrad.replicated_layout import ReplicatedLayout
from taskgrad.tracing import random_state_kept
from taskgrad.worker_names import WorkerName

Maker = Callable[[Pipeline, int], Schedule]


def planner(
    layout: Layout, make_schedule: Maker, select: Select | None, *, flush: bool, at_once: bool
) -> Callable[[int], Plan]:
    """A function from a number of microbatches to their plan; it caches the last plans.

    `select` is what steps take of the model's output. With `flush` no worker updates before the
    gradients of all are complete. With `at_once` replicas have their actions in one order, as those
    that wait for each other need.
    """
    replicas = len(layout.replicas) if isinstance(layout, ReplicatedLayout) else 1

    @cache
    def unscheduled() -> Plan:
        workers = tuple(
            PlannedWorker(w, layout.devices[w], _own_name(layout.session.named(w)))
            for w in (shard.worker for shard in layout.shards)
        )
        stages = stages_of(layout, select)
        return Plan(
            layout.title, stages, workers, flush=flush, replicas=replicas, idle=_idle(layout)
        )

    @lru_cache(maxsize=16)
    def plan(microbatches: int) -> Plan:
        found = unscheduled()
        counts = [len(range(replica, microbatches, replicas)) for replica in range(replicas)]
        if not all(counts):  # what has no microbatch hears of the others only so
            found = replace(found, flush=True)
        made = {count: make_schedule(found.pipeline, count) for count in {*counts} - {0}}
        if at_once:
            made = {count: made[counts[0]].first(count) for count in made}
        return found.with_schedule(*(made.get(count) for count in counts))

    return plan


def _idle(layout: Layout) -> tuple[int, ...]:
    """The workers of replicas where no parameter that is trained lives."""
    if not isinstance(layout, ReplicatedLayout):
        return ()
    homes = {layout.home(name) for name in layout.trainable}
    return tuple(i for i, shard in enumerate(layout.shards) if shard not in homes)


def _own_name(worker: WorkerName) -> str:
    return "" if worker.short == worker.address else worker.short


def stages_of(layout: Layout, select: Select | None = None) -> tuple[Stage, ...]:
    """The stages of a chain: each is one of its calls."""
    workers = [shard.worker for shard in layout.shards]  # of the first replica first
    with torch.enable_grad(), random_state_kept():
        calls = layout.planned_calls(select)
    reached = set(calls_behind(calls[-1:]))
    index: dict[Node, int] = {call: i for i, call in enumerate(calls)}
    return tuple(
        Stage(
            title=call.title,
            layers=tuple(i for i, _, _ in call.spec.steps if i != FUNCTION),
            names=tuple(name for i, name, _ in call.spec.steps if i != FUNCTION),
            worker=workers.index(call.worker or ""),
            inputs=tuple({index[n]: None for i in call.inputs if (n := whole(i)) in index}),
            trained=call in reached,
        )
        for call in calls
    )


def maker_of(schedule: str | Maker) -> Maker:
    """The function that makes the schedules of this name; or the user's own, with checks added.

    Raises ValueError if there is no schedule of this name; TypeError if it is neither a name nor a
    function. The result raises TypeError if the user's function returns no schedule, ValueError if
    the schedule is wrong.
    """
    if isinstance(schedule, str):
        if schedule == "auto":
            return automatic
        if schedule not in NAMES:
            raise ValueError(
                f"there is no schedule {schedule!r}; there are {', '.join(NAMES)}, and auto"
            )
        return partial(named_schedule, schedule)
    if not callable(schedule) or isinstance(schedule, type):
        raise TypeError(
            f"schedule is {', '.join(map(repr, NAMES))} or 'auto', or a function of a Pipeline "
            f"and the number of microbatches; got {shown(schedule)}"
        )

    def checked(pipeline: Pipeline, microbatches: int) -> Schedule:
        found = schedule(pipeline, microbatches)
        if not isinstance(found, Schedule):
            raise TypeError(
                "schedule, a function of a Pipeline and the number of microbatches, makes a "
                f"taskgrad.plan.schedule.Schedule; it gave {shown(found)}"
            )
        if (found.pipeline, found.microbatches) != (pipeline, microbatches):
            raise ValueError(
                f"the schedule is of {found.microbatches} microbatches on {found.pipeline}, "
                f"and not of {microbatches} on {pipeline}, which it was to be made for"
            )
        check(found)
        return found

    return checked


def automatic(pipeline: Pipeline, microbatches: int) -> Schedule:
    """The schedule with the shortest step at the memory of 1F1B, by simulation.

    No worker holds more tapes than 1F1B's fullest one, and each of F, B and W takes one unit of
    time at every stage.
    """
    stages, workers = len(pipeline.workers), len(pipeline.stages_of)
    candidates = [named_schedule(name, pipeline, microbatches) for name in NAMES]
    limit = max(named_schedule("1f1b", pipeline, microbatches).peak_tapes())
    return fastest(candidates, Costs.uniform(stages), [limit] * workers)
