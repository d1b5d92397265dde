"""Join the outputs of all ranks along the mapped axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.graph.pytree import Structure, describe, flatten
from taskgrad.spmd.axes import Axis, spread_out
from taskgrad.spmd.levels import Level

Output = tuple[list[Any], Structure]
"""What a rank has returned: its leaves and its structure."""


def together(
    what: str, levels: Sequence[Level], sizes: Sequence[int], outputs: Sequence[Output]
) -> Any:
    """The outputs of all ranks, in row-major order of the mapped axes, as one value.

    Raises ValueError if they differ in structure or shape, or do not fit the axes.
    """
    trees: list[Any] = []
    for level, size in zip(reversed(levels), reversed(sizes), strict=True):
        along = what if len(levels) == 1 else f"{what} along axis {level.axis_name!r}"
        groups = [outputs[i : i + size] for i in range(0, len(outputs), size)]
        trees = [_together(along, group, level.out_axes) for group in groups]
        outputs = list(map(flatten, trees))
    return trees[0]


def _together(what: str, trees: Sequence[Output], out_axes: Any) -> Any:
    """The ranks' outputs as one."""
    axes = axes_of(what, trees, out_axes)
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    joined = [join(c, a, what) for c, a in zip(columns, axes, strict=True)]
    return trees[0][1].build(joined)


def axes_of(what: str, trees: Sequence[Output], out_axes: Any) -> list[Any]:
    """The axis of each leaf of the ranks' outputs, or what stays along which one.

    Raises ValueError if the outputs differ in structure, or the axes are no prefix of it.
    """
    structure = trees[0][1]
    first = structure.build(trees[0][0])
    for rank, (leaves, other) in enumerate(trees):
        if other != structure:
            raise ValueError(
                f"{what}: the ranks' outputs differ in structure: rank 0 gave "
                f"{describe(first)}, rank {rank} gave {describe(other.build(leaves))}"
            )
        if other.skeletons != structure.skeletons:
            raise ValueError(
                f"{what}: the ranks' outputs hold objects ({describe(first)}) that differ between "
                f"rank 0 and rank {rank} in more than their tensors. Return the tensors themselves"
            )
    return spread_out(out_axes, first)


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
