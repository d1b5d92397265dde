"""Uses of a chain's layers outside of its training run between two steps, not within one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from taskgrad.graph.calls import Call
from taskgrad.graph.nodes import Node
from taskgrad.graph.pullback import BatchedRead, Pullback, StoredGrad
from taskgrad.graph.shards import ChainRef, Shard


@contextmanager
def between_steps(nodes: Sequence[Node], chains: Iterable[ChainRef] = ()) -> Iterator[None]:
    """A block in which nodes are submitted that use layers, or in which these chains' are used.

    Steps that a trainer has submitted end first, and later ones wait for these nodes: else a value
    would be of one step on one worker, and of another step on another. A step that was unfinished
    when its trainer ceased to exist is taken back. LayerError or WorkerLostError if such a step
    failed.
    """
    used: dict[ChainRef, list[Node]] = {chain: [] for chain in chains}
    for node in nodes:
        for shard in _shards_of(node):
            used.setdefault(shard.chain, []).append(node)
    with ExitStack() as entered:
        for chain, users in used.items():
            trainer: Any = chain.trained_by()
            if trainer is None:
                chain.recover()
            if hasattr(trainer, "between_steps"):
                entered.enter_context(trainer.between_steps(users))
        yield


def _shards_of(node: Node) -> Iterator[Shard]:
    """The shards whose layers or gradients a node uses."""
    for part in node.reads if isinstance(node, BatchedRead) else (node,):
        call = part.call if isinstance(part, Pullback) else part
        if isinstance(call, Call | StoredGrad) and call.shard is not None:
            yield call.shard
