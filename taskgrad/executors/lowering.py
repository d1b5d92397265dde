"""Nodes as a Dask graph: each a task of the same key, pinned to its worker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import DataNode, Task, TaskRef

from taskgrad.cluster.scheduler_plugin import ANNOTATION
from taskgrad.cluster.tasks import run_action
from taskgrad.cluster.wire.serialize import dumps_whole
from taskgrad.executors.table import Order, TaskTable
from taskgrad.graph.calls import BufferState, Call
from taskgrad.graph.leaves import External, Leaf, Primal
from taskgrad.graph.nodes import Element, Node, Sum
from taskgrad.graph.parts import KeptCall, PartCall, PartView
from taskgrad.graph.pullback import (
    BatchedRead,
    CotangentCheck,
    ParameterGrad,
    Pullback,
    StoredGrad,
    TakenGrads,
    WeightPullback,
)
from taskgrad.graph.pytree import map_leaves
from taskgrad.graph.shards import ShardCall
from taskgrad.graph.slices import SampleFraction, Slice
from taskgrad.worker import shard_ops
from taskgrad.worker.actions import (
    Add,
    OnShard,
    Pick,
    ReadAll,
    ReadBuffers,
    ReadGradient,
    TakeGradients,
    TakeSlice,
)
from taskgrad.worker.backward import Backward, CheckCotangent, WeightBackward
from taskgrad.worker.forward import Forward
from taskgrad.worker.parts import KeepOutput, OnParts

NO_TASKS = (Leaf, Primal, PartView)
"""Nodes that are there when a call that takes them runs."""


@singledispatch
def action_of(node: Node) -> Any:
    """The action that a worker runs for this node, which has a ``run(store, *values)``."""
    raise TypeError(f"no action for {type(node).__name__}")


@action_of.register
def _(node: Call) -> Forward:
    return Forward(node.spec, node.tape.kept, give_buffers=False)


@action_of.register
def _(node: KeptCall) -> KeepOutput:
    return KeepOutput(Forward(node.spec, node.tape.kept, give_buffers=False))


@action_of.register
def _(node: PartCall) -> OnParts:
    return OnParts(node.key, node.label, node.function, node.arguments, node.stays)


@action_of.register
def _(node: Pullback) -> Backward:
    inputs = list(node.inputs)
    positions = iter(range(len(node.cotangents)))
    factor, weight = node.scale

    def sources(parts_of: Mapping[str, Sequence[Node]]) -> dict[str, list[str | int]]:
        return {
            name: [p.key if isinstance(p, Pullback) else inputs.index(p) for p in parts]
            for name, parts in parts_of.items()
        }

    return Backward(
        key=node.key,
        token=node.call.key,
        title=node.call.title,
        sources=tuple(None if c is None else next(positions) for c in node.cotangents),
        positions=node.positions,
        carried=tuple((slot, inputs.index(given)) for slot, given in node.carried),
        wanted=node.wanted,
        retain=node.retain,
        draw=node.call.spec.draw,
        factor=factor,
        weight=None if weight is None else inputs.index(weight),
        includes=sources(node.includes),
        accumulate=sources(node.accumulate),
        peers=node.peers,
        rank=node.call.spec.rank,
    )


@action_of.register
def _(node: WeightPullback) -> WeightBackward:
    return WeightBackward(node.call.key, node.call.title, node.call.spec.draw)


@action_of.register
def _(node: Slice) -> TakeSlice:
    fraction = isinstance(node, SampleFraction)
    return TakeSlice(node.dims, node.index, node.count, node.what, fraction)


action_of.register(CotangentCheck, lambda node: CheckCotangent(node.call.key))
action_of.register(Element, lambda node: Pick(node.position))
action_of.register(ParameterGrad, lambda node: ReadGradient(node.pullback.key, node.name))
action_of.register(
    StoredGrad, lambda node: OnShard(node.shard.token, shard_ops.gradient, {"name": node.name})
)
action_of.register(
    TakenGrads, lambda node: TakeGradients(node.pullback.key, node.names, node.stays)
)
action_of.register(BatchedRead, lambda node: ReadAll(tuple(map(action_of, node.reads))))
action_of.register(Sum, lambda node: Add())
action_of.register(BufferState, lambda node: ReadBuffers(node.call.key))
action_of.register(ShardCall, lambda node: OnShard(node.shard.token, node.function, node.arguments))


def _with_buffers(action: Forward | KeepOutput) -> Forward | KeepOutput:
    """The same forward, which also gives the new values of its function's buffers."""
    if isinstance(action, KeepOutput):
        return KeepOutput(replace(action.work, give_buffers=True))
    return replace(action, give_buffers=True)


def _compact(leaf: Any) -> Any:
    """A view without the rest of its storage, all of which pickle would take along."""
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
        own = leaf.numel() * leaf.element_size()
        if leaf.device.type != "meta" and leaf.untyped_storage().nbytes() > own:
            return leaf.clone()
    return leaf


def lower(
    nodes: Collection[Node],
    name: str,
    table: TaskTable,
    order: Order | None = None,
    *,
    ordered: bool,
    names: Mapping[str, Any],
) -> HighLevelGraph:
    """A Dask graph in which every one of these nodes is a task under its own key.

    Parameters
    ----------
    nodes
        Nodes that have not run; what else they need has run, or is a leaf.
    name
        The layer's name in the graph.
    table
        The futures of what was submitted before, and the worker of each node.
    order
        For a node, others that must have run before it.
    ordered
        Make each backward task depend on its forward, which keeps the tape until then. Not needed
        where the driver holds the forward's future, but for a first pullback, whose cotangents do
        not come from a task.
    names
        The names of workers by their addresses.
    """
    tasks: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    dependencies: dict[str, set[str]] = {}
    pins: dict[str, str] = {}
    order = order or {}
    read_back = {n.call for n in nodes if isinstance(n, BufferState)}
    for node in nodes:
        if isinstance(node, External):
            graph = node.collection.__dask_graph__()
            layers.update(graph.layers)
            dependencies.update(graph.dependencies)
            continue
        if isinstance(node, Primal | PartView):
            continue
        if isinstance(node, Leaf):
            tasks[node.key] = DataNode(node.key, node.sent())
        else:
            action = action_of(node)
            if node in read_back:
                action = _with_buffers(action)
            tasks[node.key] = _task(node, action, table, order, ordered)
        worker = table.worker_of(node)
        if worker is not None:
            pins[node.key] = worker
    pinned_to = {key: names.get(address, address) for key, address in pins.items()}
    annotations: dict[str, Any] = {ANNOTATION: pinned_to.get}
    if len(pins) == len(tasks):
        annotations["workers"] = lambda key: [pins[key]]
    layer = MaterializedLayer(tasks, annotations=annotations)
    foreign = set(layers)
    return HighLevelGraph({**layers, name: layer}, {**dependencies, name: foreign})


def _task(node: Node, action: Any, table: TaskTable, order: Order, ordered: bool) -> Task:
    literals: dict[int, Any] = {}
    references: list[TaskRef] = []
    for position, given in enumerate(node.inputs):
        source = table.resolve(given)
        if isinstance(source, PartView):
            literals[position] = source.stored
        elif isinstance(source, Leaf) and source not in table.futures:
            literals[position] = map_leaves(_compact, source.sent())
        else:
            references.append(TaskRef(source.key))
    # For the order alone:
    if (
        isinstance(node, Pullback)
        and (ordered or not references)
        and node.call not in table.futures
    ):
        references.append(TaskRef(node.call.key))
    references += [TaskRef(table.resolve(b).key) for b in (*node.awaits, *order.get(node, ()))]
    settings = node.settings
    if isinstance(node, Call) and node.tape.wanted and not node.tape.kept:
        settings = settings and settings.without_grad()
    payload = dumps_whole((action, settings, len(node.inputs), literals))
    return Task(node.key, run_action, payload, *references)
