"""Microbatches: slices of a batch, whatever its structure."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import describe, flatten, map_leaves

Dims = Any
"""The batch dimension of every tensor of a batch: a number for all, or a pytree of numbers and None
in the structure of the batch, where None marks what every microbatch gets whole."""


def as_tensors(value: Any) -> Any:
    """The same batch with tensors for NumPy arrays."""
    return map_leaves(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, value)


def batch_size(value: Any, dims: Dims, what: str) -> int | None:
    """The number of samples; None if nothing is sliced.

    Raises ValueError if the dimensions do not fit the batch, or its tensors differ in size there.
    """
    sizes: dict[int, None] = {}
    leaves, _ = flatten(value)
    for leaf, dim in zip(leaves, _dims_of(value, dims, what), strict=True):
        if isinstance(leaf, torch.Tensor) and dim is not None:
            if leaf.layout is not torch.strided or leaf.is_meta:
                kind = "on the meta device" if leaf.is_meta else str(leaf.layout)
                raise ValueError(
                    f"{what} has a tensor that cannot be cut into microbatches: it is {kind}, "
                    f"{describe(leaf)}. Give dense tensors with values"
                )
            if not -leaf.dim() <= dim < leaf.dim():
                raise ValueError(
                    f"{what} has no batch dimension {dim}: one of its tensors is {describe(leaf)}"
                )
            sizes[leaf.shape[dim]] = None
    if len(sizes) > 1:
        raise ValueError(
            f"{what} has tensors of different batch sizes {sorted(sizes)}: {describe(value)}"
        )
    return next(iter(sizes), None)


def cut(value: Any, dims: Dims, index: int, count: int, what: str) -> Any:
    """Slice `index` of `count`, as ``torch.tensor_split``: the first ones may be one longer."""
    leaves, structure = flatten(value)
    return structure.build(
        [
            torch.tensor_split(leaf, count, dim)[index]
            if isinstance(leaf, torch.Tensor) and dim is not None
            else leaf
            for leaf, dim in zip(leaves, _dims_of(value, dims, what), strict=True)
        ]
    )


def _dims_of(value: Any, dims: Dims, what: str) -> list[int | None]:
    leaves, structure = flatten(value)
    if isinstance(dims, int | None) and not isinstance(dims, bool):
        return [dims] * len(leaves)
    found, given = flatten(dims)
    if structure.has_objects and given != structure:
        with contextlib.suppress(ValueError):
            found, given = structure.flatten_up_to(dims), structure
    if given != structure or not all(isinstance(d, int | None) for d in found):
        raise ValueError(
            f"the batch dimensions of {what} are one number, or a pytree of its structure with a "
            f"number or None for each tensor; got {dims!r} for {describe(value)}"
        )
    return found


class Slice(Node):
    """One microbatch of a batch that is on a worker."""

    __slots__ = ("count", "dims", "index", "what")

    def __init__(
        self, source: Node, dims: Dims, index: int, count: int, what: str, worker: str
    ) -> None:
        super().__init__(new_key("slice", what), worker, [source])
        self.dims = dims
        self.index = index
        self.count = count
        self.what = what


class SampleFraction(Slice):
    """The fraction of all samples that is in one microbatch, a number."""

    __slots__ = ()
