"""Split the arguments of a `pmap` among its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.graph.pytree import Slot, flatten
from taskgrad.spmd.axes import Axis, mapped_size, spread
from taskgrad.spmd.levels import Level
from taskgrad.thunk import Thunk


class Split:
    """The arguments of all ranks.

    Attributes
    ----------
    sizes
        The length of each level's axis.
    leaves, structure
        The arguments as (args, kwargs): what all ranks get, and slots for the parts.
    parts
        For each rank, in row-major order of the axes, the tensors for the slots. A part that
        several ranks get is one tensor.
    """

    def __init__(self, what: str, levels: Sequence[Level], args: Any, kwargs: Any) -> None:
        leaves, self.structure = flatten((args, kwargs))
        if any(isinstance(leaf, Thunk) for leaf in leaves):
            raise TypeError(f"{what} runs at once and takes tensors: tg.collect its thunks first")
        sizes, axes, shown = [], [], list(leaves)
        for level in levels:
            found = _axes(level, shown, args, kwargs, what)
            sizes.append(mapped_size(shown, found, level.axis_size, what))
            axes.append(found)
            # What one rank of this level gets, as far as the next one looks at it.
            with torch.no_grad():
                shown = [
                    leaf if axis is None else leaf.select(axis, 0)
                    for leaf, axis in zip(shown, found, strict=True)
                ]
        self.sizes = tuple(sizes)
        mapped = [i for i, of_leaf in enumerate(zip(*axes, strict=True)) if set(of_leaf) != {None}]
        slots = {i: Slot(position) for position, i in enumerate(mapped)}
        self.leaves = [slots.get(i, leaf) for i, leaf in enumerate(leaves)]
        # Split by torch, whose autograd also joins the gradients.
        split = [_parts(leaves[i], [found[i] for found in axes], sizes) for i in mapped]
        count = torch.Size(sizes).numel()
        self.parts: list[tuple[torch.Tensor, ...]] = [
            tuple(parts[rank] for parts in split) for rank in range(count)
        ]


def _axes(level: Level, leaves: Sequence[Any], args: Any, kwargs: Any, what: str) -> list[Axis]:
    """The mapped axis of each leaf at one level; None has none."""
    in_axes, static = level.in_axes, level.static
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(
            f"{what}: in_axes has {len(in_axes)} entries for {len(args)} positional arguments"
        )
    if static and max(static) >= len(args):
        raise ValueError(
            f"{what}: static_broadcasted_argnums has {max(static)}, and there are {len(args)} "
            "positional arguments. What is static is given by position"
        )
    if static:
        entries = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        in_axes = tuple(None if i in static else entry for i, entry in enumerate(entries))
    found = spread(in_axes, args, "in_axes") + [0] * len(flatten(kwargs)[0])
    return [None if leaf is None else a for leaf, a in zip(leaves, found, strict=True)]


def _parts(leaf: torch.Tensor, axes: Sequence[Axis], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The part of each rank, in row-major order."""
    parts = [leaf]
    for axis, size in zip(axes, sizes, strict=True):
        split: dict[int, Sequence[torch.Tensor]] = {}
        for part in parts:
            if id(part) not in split:
                split[id(part)] = [part] * size if axis is None else part.unbind(axis)
        parts = [piece for part in parts for piece in split[id(part)]]
    return parts
