"""One training step as a graph: microbatches through all stages and back, then the update."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

import torch

from taskgrad.executors.base import Launch
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.calls import LOSS, Call, Draw, LayerStep, LossSpec, StepContext
from taskgrad.graph.functions import template
from taskgrad.graph.nodes import Node, ancestors
from taskgrad.graph.pullback import ParameterGrad, Pullback, TakenGrads, WeightPullback
from taskgrad.graph.pytree import Slot
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.layout import Layout, Select
from taskgrad.plan.plan import Plan
from taskgrad.train.data import Batch
from taskgrad.train.replica_buffers import buffers_sent, norm_moments
from taskgrad.train.turns import Ranks, ranks_of
from taskgrad.worker import optimizing, shard_ops, training

Recompute = Callable[[Sequence[LayerStep], int, int], tuple[tuple[int, int], ...]]
"""(a call's layers, microbatch, microbatches) -> the (start, stop) of those run in the backward."""


@dataclass(frozen=True)
class Settings:
    """The settings of a trainer that are the same for every step."""

    plan: Callable[[int], Plan]  # for this number of microbatches
    seed: int
    accumulate: int
    clip_norm: float | None
    clip_value: float | None
    autocast: tuple[tuple[str, torch.dtype], ...]
    recompute: Recompute
    check_finite: bool
    order: list[str]  # the trainable parameters, as in the model
    groups: list[str]  # the names of the optimizer's groups
    sync_norms: bool  # replicas have batch norms in common
    deferred_norms: bool  # running statistics are those of the whole batch
    select: Select | None  # what steps take of the model's output


@dataclass
class Step:
    """A step that was built: its results, the last task on each shard, and the order of execution.

    The next step waits for the last tasks; `settles` come when all shards have committed. Once the
    step is launched all of them are references to its tasks.
    """

    number: int
    report: ShardCall
    last: dict[Shard, Node]
    settles: list[Node]
    order: dict[Node, tuple[Node, ...]]
    """For an action the one before it in the schedule, if any, or in the step before."""
    scheduled: dict[str, dict[Node, str]]
    """For each worker the actions of its schedule in order, with their names in the plan."""
    executed: dict[str, dict[Node, str]]
    """The same with the sums of gradients that are taken between these actions, without names."""
    ahead: list[Node]
    """Tasks of shards that may run before their updates, to make them shorter."""
    launch: Launch | None = None

    def __post_init__(self) -> None:
        self.reported: Node = self.report
        """The task of the report, once it is launched."""

    @property
    def targets(self) -> list[Node]:
        """All that has to run."""
        return [self.reported, *self.last.values(), *self.settles]

    def launched(self, launch: Launch) -> None:
        """Keep references to its tasks only: drop the graph, and with it the steps before."""
        tasks = iter(launch.targets)
        self.reported = next(tasks)
        self.last = {shard: next(tasks) for shard in self.last}
        self.settles = list(tasks)
        self.order, self.scheduled, self.executed, self.ahead = {}, {}, {}, []
        self.launch = launch


@dataclass(frozen=True)
class _Microbatch:
    """The nodes of one microbatch: its calls, oldest first, and their pullbacks.

    `apart` are gradients, by shard and name, that are added up where their parameters live.
    """

    calls: list[Call]
    pullbacks: dict[Call, Pullback]
    apart: dict[tuple[Shard, str], tuple[ParameterGrad, ...]]


def build(
    layout: Layout,
    batch: Batch,
    number: int,
    settings: Settings,
    before: Step | None,
    calls: Sequence[list[Call]] | None = None,
) -> Step:
    """The graph of a step, which starts on each shard when the step before is done there.

    `calls` are those of its microbatches, if they have been made.
    """
    update = (number + 1) % settings.accumulate == 0
    calls = calls or calls_of(layout, batch, number, settings)
    plan, earlier = settings.plan(batch.count), {} if before is None else before.last
    parts = [_microbatch(part, batch, m, settings) for m, part in enumerate(calls)]
    scheduled = _scheduled(parts, plan)
    apart = _added_apart(layout, parts)
    executed = _with_sums(scheduled, apart, plan.replicas) if plan.replicas > 1 else scheduled
    order, tails = _order(batch, executed, layout, earlier)
    added = {shard: sums[-1] for shard, sums in apart.items()}
    summary = {"update": update, "norms": settings.clip_norm is not None}
    rescale = [] if batch.rescale is None else [batch.rescale]
    prepares = [
        layout.task(
            shard,
            training.prepare,
            # No call begins the step where no layer runs.
            summary if scheduled[shard.worker] else {**summary, "step": number},
            after=rescale,
            awaits=[last[shard] for last in (tails, added) if shard in last],
        )
        for shard in layout.shards
    ]
    losses = [part.calls[-1] for part in parts]
    weights = [w for w in batch.weights if isinstance(w, Node)]
    report = layout.task(
        losses[0].shard or layout.last,
        training.report,
        {
            "step": number,
            "weights": None if weights else batch.weights,
            "order": settings.order if update and settings.clip_norm is not None else None,
            "workers": [shard.worker for shard in layout.shards],
            "groups": settings.groups,
        },
        after=[*losses, *weights, *prepares],
    )
    copied = copied_names(layout.shards)
    arguments = {
        "step": number,
        "update": update,
        "clip_norm": settings.clip_norm,
        "clip_value": settings.clip_value,
        "order": settings.order,
    }
    moments = norm_moments(layout, prepares) if settings.deferred_norms else {}
    commits: dict[Shard, Node] = {
        shard: layout.task(
            shard,
            training.commit,
            {**arguments, "send": copied.get(shard, []) if update else []},
            after=[*(prepares if i in plan.waits else [prepares[i]]), *moments.get(shard, ())],
            name="update",
        )
        for i, shard in enumerate(layout.shards)
    }
    last = dict(commits)
    if update:  # copies of tied parameters get the new values
        last |= layout.refreshes(commits)
    last |= buffers_sent(layout, last)
    settles = layout.tasks(optimizing.settle, awaits=list(commits.values()), number=number)
    ahead = layout.tasks(training.copy_ahead, step=number) if update else []
    return Step(number, report, last, list(settles), order, scheduled, executed, list(ahead))


def calls_of(layout: Layout, batch: Batch, number: int, settings: Settings) -> list[list[Call]]:
    """The calls of each microbatch of a step, the last one with the loss."""
    layout.plan_by(*batch.inputs[0], settings.autocast, settings.select)
    plan = settings.plan(batch.count)
    orders = plan.orders
    split = {(a.stage, a.microbatch) for order in orders for a in order if a.kind == "W"}
    ranks = ranks_of(plan, settings.seed) if settings.sync_norms else {}
    return [_calls(layout, batch, number, m, settings, split, ranks) for m in range(batch.count)]


def _calls(
    layout: Layout,
    batch: Batch,
    number: int,
    index: int,
    settings: Settings,
    split: Container[tuple[int, int]],
    ranks: Ranks,
) -> list[Call]:
    """The calls of one microbatch.

    `split` has the (stage, microbatch) of those whose weights have a backward of their own.
    """
    stages = count()

    def extend(
        steps: tuple[LayerStep, ...], inputs: tuple[Node, ...], last: bool
    ) -> tuple[tuple[LayerStep, ...], tuple[Node, ...], StepContext]:
        recompute = settings.recompute(steps, index, batch.count)
        loss = None
        if last:
            steps = (*steps, (LOSS, "loss", batch.loss_kind))
            slot = len(inputs)
            scale = batch.scales[index : index + 1]
            loss = LossSpec(_targets_at(slot), settings.check_finite, slot + 1 if scale else None)
            inputs = (*inputs, batch.targets[index], *scale)
        at = next(stages), index
        return steps, inputs, StepContext(draw, recompute, loss, at in split, *ranks.get(at, ()))

    draw = Draw(settings.seed, number, index)
    args, kwargs = batch.inputs[index]
    with torch.enable_grad():
        return layout.calls(
            args,
            kwargs,
            mode=True,
            autocast=settings.autocast,
            extend=extend,
            select=settings.select,
            draw=draw,
        )


def _microbatch(calls: list[Call], batch: Batch, index: int, settings: Settings) -> _Microbatch:
    """Forward, and backward with the gradients that are complete after each part."""
    share = batch.weights[index]
    scale: tuple[float, Node | None]
    if batch.scales:
        scale = 1.0, batch.scales[index]
    elif isinstance(share, Node):
        scale = 1 / settings.accumulate, share
    else:
        scale = share / settings.accumulate, None
    found = adjoint([(calls[-1], None)], scale=scale, accumulate=True)
    pullbacks = {pullback.call: pullback for pullback in found.pullbacks}
    for call in calls:
        if call not in pullbacks:
            call.tape.drop()  # what takes its value was called without grad
    return _Microbatch(calls, pullbacks, found.apart)


def _added_apart(layout: Layout, parts: Sequence[_Microbatch]) -> dict[Shard, list[Node]]:
    """For shards that get gradients from others: the tasks that add these, one a microbatch.

    They run one after the other, in the order of the microbatches.
    """
    sums: dict[Shard, list[Node]] = {}
    for part in parts:
        by_home: dict[Shard, dict[str, tuple[ParameterGrad, ...]]] = {}
        for (home, name), found in part.apart.items():
            by_home.setdefault(home, {})[name] = found
        for home, named in by_home.items():
            names: dict[Pullback, list[str]] = {}
            for name, grads in named.items():
                for grad in grads:
                    names.setdefault(grad.pullback, []).append(name)
            position = {pullback: i for i, pullback in enumerate(names)}
            sources = {
                name: [(position[g.pullback], names[g.pullback].index(name)) for g in grads]
                for name, grads in named.items()
            }
            before = sums.setdefault(home, [])
            own = [i for pullback, i in position.items() if pullback.worker == home.worker]
            before.append(
                layout.task(
                    home,
                    shard_ops.accumulate_taken,
                    {"parts": sources, "own": own},
                    after=[
                        TakenGrads(pullback, given, stays=pullback.worker == home.worker)
                        for pullback, given in names.items()
                    ],
                    awaits=before[-1:],
                    name="accumulate",
                )
            )
    return sums


def _with_sums(
    scheduled: Mapping[str, Mapping[Node, str]],
    sums: Mapping[Shard, Sequence[Node]],
    replicas: int,
) -> dict[str, dict[Node, str]]:
    """The actions of workers, and between them the sums of gradients for which they need not wait.

    When a worker has taken a microbatch back through all of its stages, the microbatches of the
    turns before are to be summed. What is left is at the end.
    """
    found: dict[str, dict[Node, str]] = {}
    at = {shard.worker: list(nodes) for shard, nodes in sums.items()}
    for worker, actions in scheduled.items():
        last = {_microbatch_of(n): n for n in actions if not isinstance(n, Call)}
        waiting, turns = at.get(worker, []), 0
        found[worker] = {}
        for node, name in actions.items():
            found[worker][node] = name
            if last.get(_microbatch_of(node)) is node:
                for ready in waiting[: replicas * turns]:
                    found[worker].setdefault(ready, "")
                turns += 1
    return found


def _microbatch_of(action: Node) -> int:
    call = action.call if isinstance(action, Pullback) else action
    assert isinstance(call, Call)
    assert call.spec.draw is not None
    return call.spec.draw.microbatch


@cache
def _targets_at(slot: int) -> bytes:
    """The arguments of the loss after the output: the targets, which are at this slot."""
    return template((Slot(slot),))


def _scheduled(parts: Sequence[_Microbatch], plan: Plan) -> dict[str, dict[Node, str]]:
    """For each worker the nodes of its actions in the plan's order, with their names."""
    found: dict[str, dict[Node, str]] = {}
    for worker, actions in zip(plan.workers, plan.orders, strict=True):
        nodes = found.setdefault(worker.address, {})
        for action in actions:
            if action.kind == "U":
                continue  # what `build` adds, for all shards together
            part = parts[action.microbatch]
            call = part.calls[action.stage]
            node: Node = call if action.kind == "F" else part.pullbacks[call]
            if action.kind == "W":
                node = WeightPullback(part.pullbacks[call])
            nodes[node] = str(action)
    return found


def _order(
    batch: Batch,
    scheduled: dict[str, dict[Node, str]],
    layout: Layout,
    before: dict[Shard, Node],
) -> tuple[dict[Node, tuple[Node, ...]], dict[Shard, Node]]:
    """For every action the one before it in the plan, if any; the last one of each shard."""
    order: dict[Node, tuple[Node, ...]] = {
        node: (before[node.shard],)
        for node in ancestors(batch.values)
        if isinstance(node, Call) and node.shard in before
    }
    tails: dict[Shard, Node] = {}
    for shard in layout.shards:
        last = before.get(shard)
        if last is not None and not scheduled[shard.worker]:
            tails[shard] = last
        for node in scheduled[shard.worker]:
            if last is not None:
                order[node] = (last,)
            last = tails[shard] = node
    return order, tails
