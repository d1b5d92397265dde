"""Split the arguments of a `pmap` among its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.graph.pytree import Slot, flatten
from taskgrad.spmd.axes import Axis, mapped_size, spread
from taskgrad.spmd.levels import Level
from taskgrad.spmd.sharded.arguments import rank_parts
from taskgrad.spmd.sharded.tensor import ShardedTensor
from taskgrad.thunk import Thunk
from taskgrad.worker_names import WorkerName


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
        several ranks get is one tensor. For a sharded one it is None: `at` finds it.
    """

    def __init__(self, what: str, levels: Sequence[Level], args: Any, kwargs: Any) -> None:
        leaves, self.structure = flatten((args, kwargs))
        if any(isinstance(leaf, Thunk) for leaf in leaves):
            raise TypeError(f"{what} runs at once and takes tensors: tg.collect its thunks first")
        sharded = {i: leaf.held for i, leaf in enumerate(leaves) if type(leaf) is ShardedTensor}
        sizes, axes = [], []
        shown = [sharded[i].meta() if i in sharded else leaf for i, leaf in enumerate(leaves)]
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
        mapped = [
            i
            for i, of_leaf in enumerate(zip(*axes, strict=True))
            if set(of_leaf) != {None} or i in sharded
        ]
        slots = {i: Slot(position) for position, i in enumerate(mapped)}
        self.leaves = [slots.get(i, leaf) for i, leaf in enumerate(leaves)]
        of_level = [[found[i] for found in axes] for i in mapped]
        self._sharded = {
            position: (sharded[i], of_level[position])
            for position, i in enumerate(mapped)
            if i in sharded
        }
        count = torch.Size(sizes).numel()
        # Split by torch, whose autograd also joins the gradients.
        split: list[Any] = [
            [None] * count if i in sharded else _parts(leaves[i], of_level[position], sizes)
            for position, i in enumerate(mapped)
        ]
        self.parts: list[tuple[Any, ...]] = [
            tuple(parts[rank] for parts in split) for rank in range(count)
        ]

    @property
    def has_sharded(self) -> bool:
        """True if there are sharded tensors among the arguments."""
        return bool(self._sharded)

    def at(self, workers: Sequence[WorkerName], owner: Session) -> list[tuple[Any, ...]]:
        """The parts of the ranks on these workers: those of sharded tensors as nodes.

        Raises TaskgradError if a sharded tensor is another client's.
        """
        if not self._sharded:
            return self.parts
        parts = [list(of_rank) for of_rank in self.parts]
        for position, (x, axes) in self._sharded.items():
            if x.session is not owner:
                raise TaskgradError(
                    "a sharded tensor is given to a pmap of another client: its parts are on the "
                    "workers of its own. Give pmap that client, or .gather() it"
                )
            for of_rank, part in zip(parts, rank_parts(x, axes, self.sizes, workers), strict=True):
                of_rank[position] = part
        return [tuple(of_rank) for of_rank in parts]


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
