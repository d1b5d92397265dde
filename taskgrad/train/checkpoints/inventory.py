"""The tensors of a chain that a checkpoint holds, and which of them each shard has."""

from __future__ import annotations

from typing import Any

from taskgrad.graph.layers import local_name
from taskgrad.graph.shards import Shard
from taskgrad.layout import Layout
from taskgrad.worker.checkpoint import Place

NOT_WRITTEN = "$not-written"
"""Stands in an index for an argument that cannot be written there, such as a function."""

DRIVER = "training-driver.safetensors"
"""The file of the tensors that are not on a worker."""


def inventory(layout: Layout) -> dict[str, Any]:
    """Every tensor of the model by its first name, as an index has it."""
    return {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "persistent": info.persistent,
            "trainable": info.requires_grad and not info.is_buffer,
            "names": list(info.names),
        }
        for name, info in layout.tensors.items()
    }


def living_on(layout: Layout, shard: Shard) -> dict[str, Any]:
    """The shard's own tensors: those whose first name is there; and its layers' names."""
    mine = {n: i for n, i in layout.tensors.items() if layout.home(n) is shard}
    buffers = {}
    for name, info in mine.items():
        if info.is_buffer:
            layer = layout.owner(name)
            buffers[name] = Place(layer.index, local_name(name, layer), info.persistent)
    return {
        "parameters": [n for n, info in mine.items() if not info.is_buffer],
        "buffers": buffers,
        "layers": {row.index: row.name for row in layout.layers if layout.shard_of(row) is shard},
    }
