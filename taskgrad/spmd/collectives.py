"""Collectives that reduce: sums, means and extremes over the ranks of a `pmap`.

Names, arguments and results are those of ``jax.lax``. So is the convention of reverse mode: what is
differentiated is the sum over all ranks of what flows into their outputs, as if one program had run
all ranks. The transpose of `psum` is `psum`, of `all_gather` it is `psum_scatter`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from taskgrad.graph.pytree import flatten
from taskgrad.spmd.differentiable import collective
from taskgrad.worker.collectives import Extreme, Sum
from taskgrad.worker.members import along, in_group


def psum(x: Any, axis_name: Hashable, *, axis_index_groups: Any = None) -> Any:
    """The sum over all ranks of the axis, on every rank; as ``jax.lax.psum``.

    Summed in rank order, to the same bits on all ranks; bfloat16 and float16 in float32, rounded
    once. Bools are summed as int64. In the backward, cotangents are summed likewise.

    Parameters
    ----------
    x
        A pytree of tensors and numbers, of the same shapes and dtypes on all ranks.
    axis_name
        The name that the axis has in `pmap`, or a tuple of names: then over all ranks along these
        axes, in row-major order.
    axis_index_groups
        Groups of places on the axis, which has to be one: lists that have each place once. The
        collective is then within each group.

    Raises
    ------
    NameError
        No `pmap` with this axis is running.
    ValueError
        The groups do not cover the axis.
    CollectiveError
        The ranks call different collectives.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: x / tg.psum(x, "i"), axis_name="i")
    >>> f(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    return collective(Sum(), x, in_group(axis_name, axis_index_groups))


def pmean(x: Any, axis_name: Hashable, *, axis_index_groups: Any = None) -> Any:
    """The mean over all ranks of the axis, on every rank: `psum`, divided by their number.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmean(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([2., 2.])
    """
    members = in_group(axis_name, axis_index_groups)
    leaves, structure = flatten(x)
    # As torch.mean: a sum of 16-bit numbers may be larger than any of them can be.
    wide = structure.build([leaf.float() if _is_short(leaf) else leaf for leaf in leaves])
    totals, _ = flatten(collective(Sum(), wide, members, title="pmean"))
    means: list[Any] = [None if total is None else total / members.size for total in totals]
    return structure.build(
        [
            mean.to(leaf.dtype) if _is_short(leaf) else mean
            for leaf, mean in zip(leaves, means, strict=True)
        ]
    )


def _is_short(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)


def pmax(x: Any, axis_name: Hashable, *, axis_index_groups: Any = None) -> Any:
    """The largest over all ranks, elementwise, on every rank.

    Its gradient, which JAX does not define, goes to the rank that has the largest, in equal parts
    if several ranks have it, as in ``torch.amax``.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmax(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([3., 3.])
    """
    return collective(Extreme(largest=True), x, in_group(axis_name, axis_index_groups))


def pmin(x: Any, axis_name: Hashable, *, axis_index_groups: Any = None) -> Any:
    """The smallest over all ranks, elementwise, on every rank; gradients as those of `pmax`.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmin(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([1., 1.])
    """
    return collective(Extreme(largest=False), x, in_group(axis_name, axis_index_groups))


def axis_index(axis_name: Hashable) -> int:
    """This rank's place along the axis, from 0; along several, in row-major order of their names.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: x * tg.axis_index("i"), axis_name="i")(torch.ones(2))
    tensor([0., 1.])
    """
    return along(axis_name).index


def axis_size(axis_name: Hashable) -> int:
    """How many ranks the axis has; several axes have the product of theirs.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: x * tg.axis_size("i"), axis_name="i")(torch.ones(2))
    tensor([2., 2.])
    """
    return along(axis_name).size
