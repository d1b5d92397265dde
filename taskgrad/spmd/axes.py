"""Which axis of each tensor is mapped: `in_axes` and `out_axes`, as JAX reads them.

An entry of `out_axes` can also be a `Sharded`: what stays on the workers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from taskgrad.arguments import shown
from taskgrad.graph.pytree import Structure, describe, flatten
from taskgrad.spmd.sharded.layout import Sharded

Axis = int | None
OutAxis = int | None | Sharded


def spread(axes: Any, tree: Any, what: str) -> list[Axis]:
    """An axis for each leaf of a tree; `axes` is a prefix of that tree.

    Raises ValueError if it is none; TypeError if an axis is neither an int nor None.
    """
    return _spread(axes, flatten(tree)[1], what, tree)


def spread_out(out_axes: Any, tree: Any) -> list[OutAxis]:
    """An axis, or what stays along which one, for each leaf of a tree; as `spread`."""
    return _spread(out_axes, flatten(tree)[1], "out_axes", tree)


def _spread(axes: Any, structure: Structure, what: str, tree: Any) -> list[Any]:
    if axes is None or is_axis(axes) or isinstance(axes, Sharded):
        axis = operator.index(axes) if is_axis(axes) else axes
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


def check_out(out_axes: Any) -> None:
    """Raise TypeError unless this is an axis, a `Sharded`, or a tree of them."""
    for axis in flatten(out_axes)[0]:
        if not isinstance(axis, Sharded):
            check(axis, "out_axes")


def staying(out_axes: Any) -> Any:
    """The same axes, each as a `Sharded`."""
    axes, structure = flatten(out_axes)
    return structure.build([axis if isinstance(axis, Sharded) else Sharded(axis) for axis in axes])


def stays(out_axes: Any) -> bool:
    """True if one of these is a `Sharded`."""
    return any(isinstance(axis, Sharded) for axis in flatten(out_axes)[0])


def mapped_size(leaves: Sequence[Any], axes: Sequence[Axis], given: int | None, what: str) -> int:
    """The length that all mapped axes have, which is also `given` if that is not None.

    Raises ValueError if their lengths differ, a tensor has no such axis, or no axis is mapped and
    no length given; TypeError if a leaf to be mapped is not a tensor.
    """
    sizes: dict[int, str] = {} if given is None else {given: "axis_size"}
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
        raise ValueError(
            f"{what}: no axis is mapped; give a tensor one in in_axes, or the length as axis_size"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{what}: inconsistent sizes for the axes to be mapped: "
            + ", ".join(f"{size} ({tensor})" for size, tensor in sizes.items())
        )
    [size] = sizes
    if size == 0:
        raise ValueError(f"{what}: the mapped axis has length 0")
    return size
