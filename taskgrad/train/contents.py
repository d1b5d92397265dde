"""What a checkpoint holds of a chain, and what each of its shards has of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.graph.layers import Layer, local_name, owner_of
from taskgrad.graph.nodes import new_key
from taskgrad.graph.shards import Shard, ShardCall
from taskgrad.worker.checkpoint import Place

NOT_WRITTEN = "$not-written"
"""Stands in an index for an argument that cannot be written there, such as a function."""


def inventory(chain: GraphChain) -> dict[str, Any]:
    """Every tensor of the model by its first name, as an index has it."""
    return {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "persistent": info.persistent,
            "trainable": info.requires_grad and not info.is_buffer,
            "names": list(info.names),
        }
        for name, info in chain._tensors.items()
    }


def living_on(chain: GraphChain, shard: Shard) -> dict[str, Any]:
    """The shard's own tensors: those whose first name is there; and its layers' names."""
    mine = {n: i for n, i in chain._tensors.items() if chain._home(n) is shard}
    buffers = {}
    for name, info in mine.items():
        if info.is_buffer:
            layer = owner_of(name, chain._by_name)
            buffers[name] = Place(layer.index, local_name(name, layer), info.persistent)
    return {
        "parameters": [n for n, info in mine.items() if not info.is_buffer],
        "buffers": buffers,
        "layers": {row.index: row.name for row in chain._layers if shard_of(chain, row) is shard},
    }


def shard_of(chain: GraphChain, layer: Layer) -> Shard:
    """The shard that a layer is part of."""
    return chain._shard_of[layer.index]


def on_shards(
    chain: GraphChain, function: Callable[..., Any], arguments: Mapping[Shard, Any]
) -> list[Any]:
    """Run a function of `taskgrad.worker` on shards side by side; what each gives."""
    calls = [
        ShardCall(shard, function, given, key=new_key(function.__name__, chain._title))
        for shard, given in arguments.items()
    ]
    chain._executor.run(calls)
    return chain._executor.values(calls)
