"""Replicas of what a trainer trains: checked, and installed on their workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskgrad.arguments import flag, whole
from taskgrad.chain import GraphChain
from taskgrad.errors import TaskgradError
from taskgrad.executors.between_steps import between_steps
from taskgrad.layout import Layout
from taskgrad.replicated_layout import ReplicatedLayout
from taskgrad.train.chain_group import ChainGroup


def check_replicas(given: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if a trainer's options contradict its number of replicas."""
    replicas = whole("replicas", given["replicas"], least=1)
    for name in ("shard_optimizer", "sync_batch_norm"):
        flag(name, given[name])
        if given[name] and replicas == 1:
            raise ValueError(f"{name}=True is for several replicas: give replicas=, too")
    if replicas == 1:
        return
    if given["microbatches"] < replicas:
        raise ValueError(
            f"replicas={replicas} take the microbatches of a batch by turns, and there are "
            f"{given['microbatches']}: give microbatches= at least {replicas}"
        )
    if given["deferred_batch_norm"] and given["sync_batch_norm"]:
        raise ValueError(
            "deferred_batch_norm=True and sync_batch_norm=True contradict each other: running "
            "statistics move once by those of the batch, or by those of each turn of the replicas"
        )
    if given["sync_batch_norm"] and given["compile"] is not False:
        raise ValueError(
            "sync_batch_norm=True with compile: torch.compile would have each replica normalize "
            "alone. Leave one of them out"
        )


def replicated(chain: GraphChain | ChainGroup, replicas: int, shard_optimizer: bool) -> Layout:
    """The layout of a trainer of this chain with so many replicas; nothing is on workers yet.

    Raises NotImplementedError for a function that calls several chains; PlacementError if there are
    too few workers.
    """
    if replicas == 1:
        return chain.layout
    if isinstance(chain, ChainGroup):
        raise NotImplementedError(
            f"replicas={replicas} of a function that calls chains: replicas are of one GraphChain. "
            "Make the model one module, and a GraphChain of it"
        )
    return ReplicatedLayout(chain.layout, replicas, spread=shard_optimizer)


def install(chain: GraphChain | ChainGroup, layout: Layout) -> None:
    """Put the layers that the chain has now on the workers of replicas, if there are some.

    Raises TaskgradError if the chain has gradients, which replicas would not have.
    """
    if not isinstance(layout, ReplicatedLayout):
        return
    with between_steps((), layout.refs):
        if any(row.gradients for row in chain.memory()):
            raise TaskgradError(
                "the chain has gradients, from a backward or from a trainer that accumulates, and "
                "its replicas would have none: call chain.zero_grad() first"
            )
        layout.install()


def ends_of(layout: Layout) -> list[tuple[str, str]]:
    """Of each replica the workers that take inputs and targets."""
    replicas = layout.replicas if isinstance(layout, ReplicatedLayout) else (layout,)
    return [(replica.first.worker, replica.last.worker) for replica in replicas]
