"""What replicas tell each other of their buffers at the end of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from taskgrad.graph.nodes import Node
from taskgrad.graph.shards import Shard
from taskgrad.layout import Layout
from taskgrad.replicated_layout import ReplicatedLayout
from taskgrad.worker import shard_ops, training


def norm_moments(layout: Layout, prepares: Sequence[Node]) -> dict[Shard, list[Node]]:
    """For shards of replicas with batch norms: what the other replicas recorded of theirs."""
    if not isinstance(layout, ReplicatedLayout):
        return {}
    prepared = dict(zip(layout.shards, prepares, strict=True))
    found: dict[Shard, list[Node]] = {}
    for i, shard in enumerate(layout.replicas[0].shards):
        held = layout.replicas[0].held_on(shard)
        if any(name.rpartition(".")[2] == "running_mean" for name in held):
            copies = [replica.shards[i] for replica in layout.replicas]
            given = [
                layout.task(copy, training.norm_moments, {}, awaits=[prepared[copy]])
                for copy in copies
            ]
            for copy, own in zip(copies, given, strict=True):
                found[copy] = [node for node in given if node is not own]
    return found


def buffers_sent(layout: Layout, last: Mapping[Shard, Node]) -> dict[Shard, Node]:
    """The last tasks where those of the first replica give their buffers to the others."""
    if not isinstance(layout, ReplicatedLayout):
        return {}
    found: dict[Shard, Node] = {}
    first, *others = layout.replicas
    for i, shard in enumerate(first.shards):
        if any(first.tensors[name].is_buffer for name in first.held_on(shard)):
            given = layout.task(shard, shard_ops.give_buffers, {}, awaits=[last[shard]])
            found[shard] = given
            for copy in (replica.shards[i] for replica in others):
                found[copy] = layout.task(
                    copy, shard_ops.set_buffers, {}, after=[given], awaits=[last[copy]]
                )
    return found
