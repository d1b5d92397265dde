"""Which axis of each tensor is mapped: `in_axes` and `out_axes`, as JAX reads them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from taskgrad.arguments import shown
from taskgrad.graph.pytree import Structure, describe, flatten

Axis = int | None


def spread(axes: Any, tree: Any, what: str) -> list[Axis]:
    """An axis for each leaf of a tree; `axes` is a prefix of that tree.

    Raises ValueError if it is none; TypeError if an axis is neither an int nor None.
    """
    return _spread(axes, flatten(tree)[1], what, tree)


def _spread(axes: Any, structure: Structure, what: str, tree: Any) -> list[Axis]:
    if axes is None or is_axis(axes):
        axis = None if axes is None else operator.index(axes)
        return [axis] * structure.count
    if not flatten(axes)[1].children and not structure.has_objects:
        raise TypeError(f"{what} holds ints, None and containers of them; got {axes!r}")
    try:
        parts = structure.parts_of(axes)
    except ValueError:
        raise ValueError(
            f"{what} is not a prefix of the value that it is for: it has {axes!r} where the value "
            f"has {describe(tree)}"
        ) from None
    pairs = zip(parts, structure.children, strict=True)
    return [axis for part, child in pairs for axis in _spread(part, child, what, tree)]


def is_axis(given: Any) -> bool:
    """True if this is the number of an axis: an int or a NumPy integer."""
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def check(axes: Any, what: str) -> None:
    """Raise TypeError unless this is an axis, an int or None, or a tree of them."""
    for axis in flatten(axes)[0]:
        if axis is not None and not is_axis(axis):
            raise TypeError(f"{what} holds ints, None and containers of them; got {shown(axis)}")


def mapped_size(leaves: Sequence[Any], axes: Sequence[Axis], what: str) -> int:
    """The length that all mapped axes have.

    Raises ValueError if their lengths differ, a tensor has no such axis, or no axis is mapped;
    TypeError if a leaf to be mapped is not a tensor.
    """
    sizes: dict[int, str] = {}
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                f"{what}: a {type(leaf).__name__} has no axis {axis} to map. Give it the axis None "
                "in in_axes (all ranks then get it whole), or make it a tensor"
            )
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"{what}: {describe(leaf)} has no axis {axis} to map")
        sizes.setdefault(leaf.shape[axis], f"{describe(leaf)} along axis {axis}")
    if not sizes:
        raise ValueError(f"{what}: no axis is mapped; at least one tensor needs one in in_axes")
    if len(sizes) > 1:
        raise ValueError(
            f"{what}: inconsistent sizes for the axes to be mapped: "
            + ", ".join(f"{size} ({tensor})" for size, tensor in sizes.items())
        )
    [size] = sizes
    if size == 0:
        raise ValueError(f"{what}: the mapped axis has length 0")
    return size


def join(values: Sequence[Any], axis: Axis, what: str) -> Any:
    """One leaf of the result: that leaf of all ranks' outputs stacked, or theirs if all have one.

    Raises ValueError if the ranks' shapes differ or, with the axis None, their values; TypeError if
    it is to be stacked and is neither a tensor nor a number.
    """
    first = values[0]
    if axis is None:
        for rank, value in enumerate(values):
            if not _same(first, value):
                raise ValueError(
                    f"{what}: an output with out_axes None is not the same on all ranks: rank 0 "
                    f"gave {_show(first)}, rank {rank} {_show(value)}. Reduce it (tg.psum, "
                    "tg.pmean) or give it an axis"
                )
        return first
    if all(value is None for value in values):
        return None
    if all(isinstance(value, bool | int | float | complex) for value in values):
        return torch.stack([torch.tensor(value) for value in values])
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise TypeError(
            f"{what}: outputs are tensors and numbers; got a {type(first).__name__}. Give it the "
            "axis None in out_axes if it is the same on all ranks"
        )
    if len({(value.shape, value.dtype) for value in values}) > 1:
        raise ValueError(
            f"{what}: the ranks' outputs differ in shape or dtype: "
            + ", ".join(f"rank {i} gave {describe(value)}" for i, value in enumerate(values))
        )
    if not -first.ndim - 1 <= axis <= first.ndim:
        raise ValueError(f"{what}: out_axes {axis} is no axis of {describe(first)} when stacked")
    return torch.stack(list(values), axis)


def _same(a: Any, b: Any) -> bool:
    """Bit for bit: a NaN is a NaN."""
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    with torch.no_grad():
        return bool(torch.equal(_bits(a), _bits(b)))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        return describe(value)
    return repr(value.detach() if isinstance(value, torch.Tensor) else value)
