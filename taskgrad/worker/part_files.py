"""Parts of sharded tensors in safetensors files: written and read by the worker that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from taskgrad.formats.weights import compare, opened
from taskgrad.worker.checkpoint import check_file, check_folder, write
from taskgrad.worker.store import Store

_NAME = "part"


def write_part(store: Store, part: torch.Tensor, *, folder: str, file: str) -> dict[str, Any]:
    """Write a part to a file; returns a description of its contents.

    Raises CheckpointError if the worker does not see the folder, or cannot write to it.
    """
    check_folder(store, folder)
    return write(f"worker {store.worker}", Path(folder) / file, {_NAME: part})


def read_parts(
    store: Store, *, folder: str, reads: Sequence[Mapping[str, Any]], axis: int | None
) -> torch.Tensor:
    """Read from these files what is between two indices of the axis, as one part.

    Raises CheckpointError if the worker does not see a file, or one is damaged.
    """
    found = []
    for read in reads:
        path = Path(folder) / read["file"]
        check_file(path, read, f"worker {store.worker}")
        with opened(path) as handle:
            value: torch.Tensor = handle.get_tensor(_NAME)
        compare(value, read["tensors"][_NAME], _NAME, path)
        if axis is not None:
            value = value.narrow(axis, read["start"], read["stop"] - read["start"])
        found.append(value)
    return torch.cat(found, axis) if axis is not None else found[0]
