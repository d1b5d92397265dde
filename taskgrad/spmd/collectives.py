"""Collectives: how the ranks of a `pmap` exchange values, as differentiable functions.

Names, arguments and results are those of ``jax.lax``. So is the convention of reverse mode: what is
differentiated is the sum over all ranks of what flows into their outputs, as if one program had run
all ranks. The transpose of `psum` is `psum`, of `all_gather` it is `psum_scatter`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from taskgrad.arguments import flag, whole
from taskgrad.graph.pytree import carries_gradient, flatten
from taskgrad.worker.collectives import (
    AllToAll,
    Extreme,
    Gather,
    Operation,
    Permute,
    Scatter,
    Sum,
)
from taskgrad.worker.communicator import Members, current


def psum(x: Any, axis_name: Hashable) -> Any:
    """The sum over all ranks of the axis, on every rank; as ``jax.lax.psum``.

    Summed in rank order, to the same bits on all ranks; bfloat16 and float16 in float32, rounded
    once. Bools are summed as int64. In the backward, cotangents are summed likewise.

    Parameters
    ----------
    x
        A pytree of tensors and numbers, of the same shapes and dtypes on all ranks.
    axis_name
        The name that the axis has in `pmap`.

    Raises
    ------
    NameError
        No `pmap` with this axis is running.
    CollectiveError
        The ranks call different collectives.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: x / tg.psum(x, "i"), axis_name="i")
    >>> f(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    return _collective(Sum(), x, axis_name)


def pmean(x: Any, axis_name: Hashable) -> Any:
    """The mean over all ranks of the axis, on every rank: `psum`, divided by their number.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmean(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([2., 2.])
    """
    size = axis_size(axis_name)
    leaves, structure = flatten(x)
    # As torch.mean: a sum of 16-bit numbers may be larger than any of them can be.
    wide = structure.build([leaf.float() if _is_short(leaf) else leaf for leaf in leaves])
    totals, _ = flatten(_collective(Sum(), wide, axis_name, title="pmean"))
    means: list[Any] = [None if total is None else total / size for total in totals]
    return structure.build(
        [
            mean.to(leaf.dtype) if _is_short(leaf) else mean
            for leaf, mean in zip(leaves, means, strict=True)
        ]
    )


def _is_short(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)


def pmax(x: Any, axis_name: Hashable) -> Any:
    """The largest over all ranks, elementwise, on every rank.

    Its gradient, which JAX does not define, goes to the rank that has the largest, in equal parts
    if several ranks have it, as in ``torch.amax``.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmax(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([3., 3.])
    """
    return _collective(Extreme(largest=True), x, axis_name)


def pmin(x: Any, axis_name: Hashable) -> Any:
    """The smallest over all ranks, elementwise, on every rank; gradients as those of `pmax`.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.pmin(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([1., 1.])
    """
    return _collective(Extreme(largest=False), x, axis_name)


def all_gather(
    x: Any,
    axis_name: Hashable,
    *,
    axis: int = 0,
    tiled: bool = False,
) -> Any:
    """The values of all ranks, on every rank.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    axis
        Where the axis of the ranks is in the result.
    tiled
        Concatenate along `axis`, rather than make a new axis there.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.all_gather(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([[1., 3.],
            [1., 3.]])
    """
    gather = Gather(whole("axis", axis), flag("tiled", tiled))
    return _collective(gather, x, axis_name)


def psum_scatter(
    x: Any,
    axis_name: Hashable,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
) -> Any:
    """The sum over all ranks, of which each rank gets its part along one axis.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    scatter_dimension
        The axis of `x` along which it is split: as long as the mapped axis, and removed from the
        result.
    tiled
        The length of the axis may be a multiple of that; the result keeps the axis.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.psum_scatter(x, "i"), axis_name="i")(torch.ones(2, 2))
    tensor([2., 2.])
    """
    scatter = Scatter(whole("scatter_dimension", scatter_dimension), flag("tiled", tiled))
    return _collective(scatter, x, axis_name)


def ppermute(x: Any, axis_name: Hashable, perm: Sequence[tuple[int, int]]) -> Any:
    """Values from rank to rank.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    perm
        Pairs (source, destination), no two with the same source, or destination. A rank that is no
        destination gets zeros.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: tg.ppermute(x, "i", [(0, 1), (1, 0)]), axis_name="i")
    >>> f(torch.tensor([1.0, 3.0]))
    tensor([3., 1.])
    """
    try:
        pairs = tuple((whole("a rank", of), whole("a rank", to)) for of, to in perm)
    except (TypeError, ValueError) as error:
        raise TypeError(f"perm has pairs (source, destination) of ranks: {error}") from error
    size = axis_size(axis_name)
    for ranks in zip(*pairs, strict=True):
        if len(set(ranks)) < len(ranks) or not all(0 <= r < size for r in ranks):
            raise ValueError(
                f"perm={list(pairs)} names a source or a destination twice, or one that is not "
                f"among the {size} ranks"
            )
    return _collective(Permute(pairs), x, axis_name)


def all_to_all(
    x: Any,
    axis_name: Hashable,
    split_axis: int,
    concat_axis: int,
    *,
    tiled: bool = False,
) -> Any:
    """Split `x` along one axis, send each rank its part, and join the parts received.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    split_axis
        The axis of `x` that is split: as long as the mapped axis, and removed from the result.
    concat_axis
        Where in the result the axis of the ranks is.
    tiled
        The length of `split_axis` may be a multiple of that; the result keeps that axis, and parts
        are concatenated along `concat_axis`.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: tg.all_to_all(x, "i", 0, 0), axis_name="i")
    >>> f(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 3.],
            [2., 4.]])
    """
    split, concat = whole("split_axis", split_axis), whole("concat_axis", concat_axis)
    exchange = AllToAll(split, concat, flag("tiled", tiled))
    return _collective(exchange, x, axis_name)


def axis_index(axis_name: Hashable) -> int:
    """This rank's place along the axis, from 0.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: x * tg.axis_index("i"), axis_name="i")(torch.ones(2))
    tensor([0., 1.])
    """
    return current(axis_name).index


def axis_size(axis_name: Hashable) -> int:
    """How many ranks the axis has.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: x * tg.axis_size("i"), axis_name="i")(torch.ones(2))
    tensor([2., 2.])
    """
    return current(axis_name).size


class _Recorded(torch.autograd.Function):
    """A collective as part of autograd's graph; its backward is one more.

    Its results are given to it, since only after the exchange is it known whether any rank takes a
    gradient. Inside the transforms of ``torch.func`` it is this function that gets at the tensors,
    so there it makes the exchange.
    """

    @staticmethod
    def forward(
        comm: Members,
        operation: Operation,
        results: list[torch.Tensor] | None,
        token: torch.Tensor,
        *xs: torch.Tensor,
    ) -> Any:
        if results is None:
            results, _ = operation.run(comm, xs, True)
        return (token.clone(), *results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.communicator, ctx.operation, *_ = inputs

    @staticmethod
    def backward(ctx: Any, token: torch.Tensor, *cotangents: torch.Tensor) -> Any:
        found = _exchange(ctx.communicator, ctx.operation.transpose(), list(cotangents))
        if isinstance(ctx.operation, Extreme):
            shares = ctx.operation.shares
            found = [g * mine / count for g, (mine, count) in zip(found, shares, strict=True)]
        return None, None, None, token, *found


def _exchange(comm: Members, operation: Operation, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of an operation, recorded where that is wanted."""
    at = [i for i, x in enumerate(xs) if carries_gradient(x)]
    if any(is_functorch_wrapped_tensor(x) for x in xs):
        if len(at) < len(xs):
            raise TypeError("inside torch.func, a collective takes floating-point tensors only")
        return list(_Recorded.apply(comm, operation, None, comm.comm.start.detach(), *xs))[1:]
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    with torch.no_grad():
        results, wanted = operation.run(comm, xs, wants)
    if not wanted or not torch.is_grad_enabled():
        return results
    if isinstance(operation, Extreme):
        operation.shares = [operation.shares[i] for i in at]
    floats = [results[i] for i in at]
    comm.comm.token, *floats = _Recorded.apply(
        comm, operation, floats, comm.comm.token, *(xs[i] for i in at)
    )
    for i, value in zip(at, floats, strict=True):
        results[i] = value
    return results


def _collective(operation: Operation, tree: Any, axis_name: Hashable, title: str = "") -> Any:
    comm = current(axis_name)
    name = title or operation.name
    leaves, structure = flatten(tree)
    at = [i for i, leaf in enumerate(leaves) if leaf is not None]
    given = [_tensor(leaves[i], name) for i in at]
    for x in given:
        operation.check(x, comm.size)
    if isinstance(operation, Sum):
        given = [x.to(torch.int64) if x.dtype is torch.bool else x for x in given]
    for i, value in zip(at, _exchange(comm, operation, given), strict=True):
        number = isinstance(leaves[i], bool | int | float | complex)
        leaves[i] = value.item() if number and operation.keeps_numbers else value
    return structure.build(leaves)


def _tensor(leaf: Any, name: str) -> torch.Tensor:
    if isinstance(leaf, bool | int):
        return torch.tensor(leaf)
    if isinstance(leaf, float | complex):
        return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.cdouble)
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
        kind = f"{leaf.layout} tensor" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        raise TypeError(f"{name} takes dense tensors and numbers; got a {kind}")
    return leaf
