"""What a checkpoint holds of a chain, and what each of its stages has of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.executors.futures import run, values_of
from taskgrad.graph.layers import Layer, local_name, owner_of
from taskgrad.graph.nodes import Stage, StageCall, new_key
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


def living_on(chain: GraphChain, stage: Stage) -> dict[str, Any]:
    """The stage's own tensors: those whose first name is there; and its layers' names."""
    mine = {n: i for n, i in chain._tensors.items() if chain._home(n) is stage}
    buffers = {}
    for name, info in mine.items():
        if info.is_buffer:
            layer = owner_of(name, chain._by_name)
            buffers[name] = Place(layer.index, local_name(name, layer), info.persistent)
    return {
        "parameters": [n for n, info in mine.items() if not info.is_buffer],
        "buffers": buffers,
        "layers": {row.index: row.name for row in chain._layers if stage_of(chain, row) is stage},
    }


def stage_of(chain: GraphChain, layer: Layer) -> Stage:
    """The stage that a layer is part of."""
    return chain._stage_of[layer.index]


def on_stages(chain: GraphChain, action: str, arguments: Mapping[Stage, Any]) -> list[Any]:
    """Run a function of `taskgrad.worker.checkpoint` on stages side by side; what each gives."""
    calls = [
        StageCall(stage, f"shards.{action}", given, key=new_key(action, chain._title))
        for stage, given in arguments.items()
    ]
    run(calls, chain._session)
    return values_of(calls, chain._session)
