"""Many small reads as one task a worker: a model's gradients are hundreds of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskgrad.graph.nodes import Node
from taskgrad.graph.reads import Bundle, Read


def bundle_reads(nodes: Sequence[Node]) -> None:
    """Make one task of those reads on one worker that have not been run."""
    by_worker: dict[str, list[Read]] = {}
    for node in dict.fromkeys(nodes):
        if isinstance(node, Read) and node.worker and node.result is None and not node.part_of:
            by_worker.setdefault(node.worker, []).append(node)
    for reads in by_worker.values():
        if len(reads) > 1:
            bundle = Bundle(reads)
            for position, read in enumerate(reads):
                read.part_of = (bundle, position)


def carrier_of(node: Node) -> Node:
    """The node whose value holds this one's: the bundle that it is part of, or itself."""
    if isinstance(node, Read) and node.part_of and node.result is None:
        return node.part_of[0]
    return node


def value_from(carrier: Node, node: Node, value: Any) -> Any:
    """A node's value, given that of its carrier."""
    if carrier is not node and isinstance(node, Read) and node.part_of:
        return value[node.part_of[1]]
    return value
