"""One training step as a graph: microbatches through all stages and back, then the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from taskgrad.arguments import shown
from taskgrad.chain import GraphChain
from taskgrad.executors.base import Executor
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.nodes import Call, Draw, Node, Pullback, Shard, ShardCall, ancestors, new_key
from taskgrad.graph.pytree import Slot
from taskgrad.graph.templates import template
from taskgrad.plan.schedule import NAMES, Pipeline, Schedule, check
from taskgrad.plan.schedule import schedule as named_schedule
from taskgrad.train.data import Batch
from taskgrad.worker import shard_ops, training
from taskgrad.worker.store import LOSS

Recompute = Callable[[Call, int, int], tuple[tuple[int, int], ...]]
"""(call, microbatch, microbatches) -> the (start, stop) of its steps that run again in backward."""


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
    """A step that was built: its results, and the last task on each shard.

    The next step waits for those; `settles` come when all shards have committed.
    """

    number: int
    report: Node
    last: dict[Shard, Node]
    settles: list[Node]
    elsewhere: list[Node] = field(default_factory=list)
    """What runs on workers that have no shard: calls behind the batch."""
    labels: dict[str, str] = field(default_factory=dict)
    """What to call the tasks in messages, by their keys."""

    @property
    def targets(self) -> list[Node]:
        """All that has to run."""
        return [self.report, *self.last.values(), *self.settles]

    def let_go(self, executor: Executor) -> None:
        """Drop what was only needed to submit it: the graph, and with it the steps before."""
        shards = {shard.worker for shard in self.last}
        for node in ancestors(self.targets):
            node.awaits = ()
            if isinstance(node, Call | ShardCall):
                self.labels[node.key] = node.label
            if executor.worker_of(node) not in {None, *shards}:
                self.elsewhere.append(node)
        for node in self.targets:
            if isinstance(node, ShardCall):
                node.after = ()


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
    tails = _order(parts, settings, {} if before is None else before.last)
    prepares = []
    for shard in chain._shards.values():
        norms = settings.clip_norm is not None
        prepare = _on(chain, shard, training.prepare, {"update": update, "norms": norms})
        prepare.awaits = (tails[shard],)
        prepares.append(prepare)
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
    labels = {p.key: p.label for part in parts for p in part.pullbacks.values()}
    return Step(number, report, last, settles, labels=labels)


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
    copies: dict[Shard, set[str]] = {}
    for shard in chain._shards.values():
        for name, home in shard.homes.items():
            copies.setdefault(home, set()).add(name)
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
            {**arguments, "send": sorted(copies.get(shard, ()))},
            prepares,
        )
        for shard in chain._shards.values()
    }
    last: dict[Shard, Node] = dict(commits)
    for shard in chain._shards.values():
        homes = [commits[home] for home in dict.fromkeys(shard.homes.values())]
        if homes and update:
            key = new_key("update", f"{chain._title} copies")
            refresh = ShardCall(shard, shard_ops.set_parameters, {}, key=key, after=homes)
            refresh.awaits = (commits[shard],)
            last[shard] = refresh
    settles: list[Node] = []
    for shard in chain._shards.values():
        settle = _on(chain, shard, training.settle, {"step": number})
        settle.awaits = tuple(commits.values())
        settles.append(settle)
    return last, settles


def _on(
    chain: GraphChain,
    shard: Shard | None,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    after: Sequence[Node] = (),
) -> ShardCall:
    assert shard is not None
    word = "update" if function is training.commit else function.__name__
    key = new_key(word, chain._title)
    return ShardCall(shard, function, arguments, key=key, after=after)


def _microbatch(
    chain: GraphChain, batch: Batch, number: int, index: int, settings: Settings
) -> _Microbatch:
    """Forward with the loss, and backward with the gradients that are complete after each part."""
    with torch.enable_grad():
        output = chain(batch.inputs[index])._node
    own = set(chain._shards.values())  # the input may be a thunk, with calls behind it
    calls = [n for n in ancestors([output]) if isinstance(n, Call) and n.shard in own]
    calls.sort(key=lambda call: call.order)
    for call in calls:
        call.mode = True
        call.draw = Draw(settings.seed, number, index)
        if settings.autocast and call.settings is not None:
            call.settings = call.settings.under_autocast(settings.autocast)
        call.recompute = settings.recompute(call, index, batch.count)
    loss = calls[-1]
    target = template((Slot(len(loss.inputs)),))
    loss.append((LOSS, "loss", batch.loss_kind), [batch.targets[index]], target)
    loss.check_finite = settings.check_finite
    found = adjoint([(loss, None)])
    pullbacks = {pullback.call: pullback for pullback in found.pullbacks}
    share = batch.weights[index]
    if isinstance(share, Node):
        pullbacks[loss].factor, pullbacks[loss].weight = 1 / settings.accumulate, share
    else:
        pullbacks[loss].factor = share / settings.accumulate
    for (home, name), grads in found.parameters.items():
        # The first layer of all that use a parameter is at its home, and comes last in a backward.
        grads[-1].pullback.accumulate[name] = tuple(
            g.pullback if g.worker == home.worker else g for g in grads
        )
    return _Microbatch(calls, pullbacks)


def _order(
    parts: Sequence[_Microbatch], settings: Settings, before: dict[Shard, Node]
) -> dict[Shard, Node]:
    """Have every action wait for the one before it in the schedule; the last one of each shard."""
    calls = parts[0].calls
    shards = list(dict.fromkeys(call.shard for call in calls if call.shard is not None))
    index: dict[Node, int] = {call: i for i, call in enumerate(calls)}
    pipeline = Pipeline(
        tuple(shards.index(call.shard) for call in calls if call.shard is not None),
        tuple(tuple(index[n] for n in c.inputs if n in index) for c in calls),
    )
    schedule = settings.schedule(pipeline, len(parts))
    tails: dict[Shard, Node] = {}
    for shard, order in zip(shards, schedule.orders, strict=True):
        last = before.get(shard)
        for action in order:
            part = parts[action.microbatch]
            call = part.calls[action.stage]
            node = call if action.kind == "F" else part.pullbacks.get(call)
            if node is None:
                continue  # nothing before it can be trained
            if shard not in tails:
                call.begins = call.draw.step if call.draw is not None else None
            node.awaits = () if last is None else (last,)
            last = tails[shard] = node
    return tails


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
