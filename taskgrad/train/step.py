"""One training step as a graph: microbatches through all stages and back, then the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from taskgrad.arguments import shown
from taskgrad.chain import GraphChain
from taskgrad.executors.base import Launch
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.calls import LOSS, Call, Draw, LayerStep, LossSpec, StepContext
from taskgrad.graph.nodes import Node, ancestors, new_key
from taskgrad.graph.pullback import Pullback
from taskgrad.graph.pytree import Slot
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.graph.templates import template
from taskgrad.plan.schedule import NAMES, Pipeline, Schedule, check
from taskgrad.plan.schedule import schedule as named_schedule
from taskgrad.train.data import Batch
from taskgrad.worker import shard_ops, training

Recompute = Callable[[Sequence[LayerStep], int, int], tuple[tuple[int, int], ...]]
"""(a call's layers, microbatch, microbatches) -> the (start, stop) of those run in the backward."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every step of a trainer."""

    schedule: Callable[[Pipeline, int], Schedule]
    seed: int
    accumulate: int
    clip_norm: float | None
    clip_value: float | None
    autocast: tuple[tuple[str, torch.dtype], ...]
    recompute: Recompute
    check_finite: bool
    order: list[str]  # the trainable parameters, as in the model


@dataclass
class Step:
    """A step that was built: its results, the last task on each shard, and the order of execution.

    The next step waits for the last tasks; `settles` come when all shards have committed. Once the
    step is launched all of them are references to its tasks.
    """

    number: int
    report: Node
    last: dict[Shard, Node]
    settles: list[Node]
    order: dict[Node, tuple[Node, ...]]
    """For an action the one before it in the schedule, if any, or in the step before."""
    behind: Sequence[Node] = ()
    """What runs on workers that have no shard: calls behind the batch."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What to call the tasks in messages, by their keys."""

    @property
    def targets(self) -> list[Node]:
        """All that has to run."""
        return [self.report, *self.last.values(), *self.settles]

    def launched(self, launch: Launch) -> None:
        """Keep references to its tasks only: drop the graph, and with it the steps before."""
        tasks = iter(launch.targets)
        self.report = next(tasks)
        self.last = {shard: next(tasks) for shard in self.last}
        self.settles = list(tasks)
        self.order = {}
        self.behind, self.labels = launch.behind, launch.labels


@dataclass(frozen=True)
class _Microbatch:
    """The nodes of one microbatch: its calls, oldest first, and their pullbacks."""

    calls: list[Call]
    pullbacks: dict[Call, Pullback]


def build(
    chain: GraphChain, batch: Batch, number: int, settings: Settings, before: Step | None
) -> Step:
    """The graph of a step, which starts on each shard when the one before is done there."""
    update = (number + 1) % settings.accumulate == 0
    parts = [_microbatch(chain, batch, number, m, settings) for m in range(batch.count)]
    order, tails = _order(batch, parts, settings, {} if before is None else before.last)
    summary = {"update": update, "norms": settings.clip_norm is not None}
    prepares = [
        _on(chain, shard, training.prepare, summary, awaits=[tails[shard]])
        for shard in chain._shards.values()
    ]
    losses = [part.calls[-1] for part in parts]
    weights = [w for w in batch.weights if isinstance(w, Node)]
    report = _on(
        chain,
        losses[-1].shard,
        training.report,
        {
            "weights": None if weights else batch.weights,
            "order": settings.order if update and settings.clip_norm is not None else None,
        },
        [*losses, *weights, *prepares],
    )
    last, settles = _finish(chain, number, settings, prepares, update=update)
    return Step(number, report, last, settles, order)


def _finish(
    chain: GraphChain,
    number: int,
    settings: Settings,
    prepares: Sequence[Node],
    *,
    update: bool,
) -> tuple[dict[Shard, Node], list[Node]]:
    """Every shard commits, then copies of tied parameters are refreshed: the last task on each.

    And what tells each shard that all have committed.
    """
    copied = copied_names(chain._shards.values())
    arguments = {
        "step": number,
        "update": update,
        "clip_norm": settings.clip_norm,
        "clip_value": settings.clip_value,
        "order": settings.order,
    }
    commits = {
        shard: _on(
            chain,
            shard,
            training.commit,
            {**arguments, "send": copied.get(shard, [])},
            prepares,
        )
        for shard in chain._shards.values()
    }
    last: dict[Shard, Node] = dict(commits)
    for shard in chain._shards.values():
        homes = [commits[home] for home in dict.fromkeys(shard.homes.values())]
        if homes and update:
            key = new_key("update", f"{chain._title} copies")
            last[shard] = ShardCall(
                shard,
                shard_ops.set_parameters,
                {},
                key=key,
                after=homes,
                awaits=[commits[shard]],
            )
    done = list(commits.values())
    settles: list[Node] = [
        _on(chain, shard, training.settle, {"step": number}, awaits=done)
        for shard in chain._shards.values()
    ]
    return last, settles


def _on(
    chain: GraphChain,
    shard: Shard | None,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    after: Sequence[Node] = (),
    *,
    awaits: Sequence[Node] = (),
) -> ShardCall:
    assert shard is not None
    word = "update" if function is training.commit else function.__name__
    key = new_key(word, chain._title)
    return ShardCall(shard, function, arguments, key=key, after=after, awaits=awaits)


def _microbatch(
    chain: GraphChain, batch: Batch, number: int, index: int, settings: Settings
) -> _Microbatch:
    """Forward with the loss, and backward with the gradients that are complete after each part."""

    def extend(
        steps: tuple[LayerStep, ...], inputs: tuple[Node, ...], last: bool
    ) -> tuple[tuple[LayerStep, ...], tuple[Node, ...], StepContext]:
        recompute = settings.recompute(steps, index, batch.count)
        loss = None
        if last:
            steps = (*steps, (LOSS, "loss", batch.loss_kind))
            loss = LossSpec(_targets_at(len(inputs)), settings.check_finite)
            inputs = (*inputs, batch.targets[index])
        return steps, inputs, StepContext(draw, recompute, loss)

    draw = Draw(settings.seed, number, index)
    with torch.enable_grad():
        calls = chain._calls(
            (batch.inputs[index],), {}, mode=True, autocast=settings.autocast, extend=extend
        )
    share = batch.weights[index]
    scale: tuple[float, Node | None] = (
        (1 / settings.accumulate, share)
        if isinstance(share, Node)
        else (share / settings.accumulate, None)
    )
    found = adjoint([(calls[-1], None)], scale=scale, accumulate=True)
    return _Microbatch(calls, {pullback.call: pullback for pullback in found.pullbacks})


@cache
def _targets_at(slot: int) -> bytes:
    """The arguments of the loss after the output: the targets, which are at this slot."""
    return template((Slot(slot),))


def _order(
    batch: Batch, parts: Sequence[_Microbatch], settings: Settings, before: dict[Shard, Node]
) -> tuple[dict[Node, tuple[Node, ...]], dict[Shard, Node]]:
    """For every action the one before it in the schedule, if any; the last one of each shard."""
    order: dict[Node, tuple[Node, ...]] = {
        node: (before[node.shard],)
        for node in ancestors([*batch.inputs, *batch.targets])
        if isinstance(node, Call) and node.shard in before
    }
    calls = parts[0].calls
    shards = list(dict.fromkeys(call.shard for call in calls if call.shard is not None))
    index: dict[Node, int] = {call: i for i, call in enumerate(calls)}
    pipeline = Pipeline(
        tuple(shards.index(call.shard) for call in calls if call.shard is not None),
        tuple(tuple(index[n] for n in c.inputs if n in index) for c in calls),
    )
    schedule = settings.schedule(pipeline, len(parts))
    tails: dict[Shard, Node] = {}
    for shard, actions in zip(shards, schedule.orders, strict=True):
        last = before.get(shard)
        for action in actions:
            part = parts[action.microbatch]
            call = part.calls[action.stage]
            node = call if action.kind == "F" else part.pullbacks.get(call)
            if node is None:
                continue  # nothing before it can be trained
            if last is not None:
                order[node] = (last,)
            last = tails[shard] = node
    return order, tails


def maker_of(
    schedule: str | Callable[[Pipeline, int], Schedule],
) -> Callable[[Pipeline, int], Schedule]:
    """What makes schedules, given its name; or a user's own way, whose schedules are each checked.

    Raises
    ------
    ValueError
        There is no schedule of this name.
    TypeError
        It is neither a name nor a function. What is made raises TypeError if a function gives no
        schedule, ValueError if it gives a wrong one.
    """
    if isinstance(schedule, str):
        if schedule not in NAMES:
            raise ValueError(f"there is no schedule {schedule!r}; there are {', '.join(NAMES)}")
        return partial(named_schedule, schedule)
    if not callable(schedule) or isinstance(schedule, type):
        raise TypeError(
            f"schedule is {' or '.join(map(repr, NAMES))}, or a function of a Pipeline and the "
            f"number of microbatches; got {shown(schedule)}"
        )
    known: dict[tuple[Pipeline, int], Schedule] = {}

    def checked(pipeline: Pipeline, microbatches: int) -> Schedule:
        if (pipeline, microbatches) not in known:
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
            known[pipeline, microbatches] = found
        return known[pipeline, microbatches]

    return checked
