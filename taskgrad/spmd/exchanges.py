"""Collectives that move values: gathers, and exchanges between the ranks of a `pmap`.

Names, arguments and results are those of ``jax.lax``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from taskgrad.arguments import flag, whole
from taskgrad.spmd.differentiable import collective
from taskgrad.worker.collectives import AllToAll, Broadcast, Gather, Permute, Scatter
from taskgrad.worker.members import along, in_group


def all_gather(
    x: Any,
    axis_name: Hashable,
    *,
    axis: int = 0,
    axis_index_groups: Any = None,
    tiled: bool = False,
) -> Any:
    """The values of all ranks, on every rank.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    axis
        Where the axis of the ranks is in the result.
    axis_index_groups
        Groups of places on the axis, which has to be one: lists that have each place once. The
        collective is then within each group, all of one length.
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
    return collective(gather, x, in_group(axis_name, axis_index_groups, equal=True))


def psum_scatter(
    x: Any,
    axis_name: Hashable,
    *,
    scatter_dimension: int = 0,
    axis_index_groups: Any = None,
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
    axis_index_groups
        Groups of places on the axis, which has to be one: lists that have each place once. The
        collective is then within each group, all of one length.
    tiled
        The length of the axis may be a multiple of that; the result keeps the axis.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> tg.pmap(lambda x: tg.psum_scatter(x, "i"), axis_name="i")(torch.ones(2, 2))
    tensor([2., 2.])
    """
    scatter = Scatter(whole("scatter_dimension", scatter_dimension), flag("tiled", tiled))
    return collective(scatter, x, in_group(axis_name, axis_index_groups, equal=True))


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
    members = along(axis_name)
    for ranks in zip(*pairs, strict=True):
        if len(set(ranks)) < len(ranks) or not all(0 <= r < members.size for r in ranks):
            raise ValueError(
                f"perm={list(pairs)} names a source or a destination twice, or one that is not "
                f"among the {members.size} ranks"
            )
    return collective(Permute(pairs), x, members)


def all_to_all(
    x: Any,
    axis_name: Hashable,
    split_axis: int,
    concat_axis: int,
    *,
    axis_index_groups: Any = None,
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
    axis_index_groups
        Groups of places on the axis, which has to be one: lists that have each place once. The
        collective is then within each group, all of one length.
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
    return collective(exchange, x, in_group(axis_name, axis_index_groups, equal=True))


def pswapaxes(x: Any, axis_name: Hashable, axis: int, *, axis_index_groups: Any = None) -> Any:
    """Swap the mapped axis with one of `x`, which is as long: `all_to_all` along that axis.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    axis
        The axis of `x`.
    axis_index_groups
        As for `all_to_all`.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: tg.pswapaxes(x, "i", 0), axis_name="i")
    >>> f(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 3.],
            [2., 4.]])
    """
    return all_to_all(x, axis_name, axis, axis, axis_index_groups=axis_index_groups)


def pshuffle(x: Any, axis_name: Hashable, perm: Sequence[int]) -> Any:
    """Values from rank to rank, in another order: rank i gets that of rank ``perm[i]``.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    perm
        For each rank the one that it gets its value from: every rank once.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: tg.pshuffle(x, "i", [1, 0]), axis_name="i")
    >>> f(torch.tensor([1.0, 3.0]))
    tensor([3., 1.])
    """
    size = along(axis_name).size
    sources = [whole("a rank", rank) for rank in perm]
    if sorted(sources) != list(range(size)):
        raise ValueError(f"perm={sources} does not have each of the {size} ranks once")
    return ppermute(x, axis_name, list(zip(sources, range(size), strict=True)))


def pbroadcast(x: Any, axis_name: Hashable, source: int) -> Any:
    """The value of one rank, on every rank.

    Parameters
    ----------
    x, axis_name
        As for `psum`.
    source
        The place on the axis of the rank that has it.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: tg.pbroadcast(x, "i", 1), axis_name="i")
    >>> f(torch.tensor([1.0, 3.0]))
    tensor([3., 3.])
    """
    members = along(axis_name)
    source = whole("source", source)
    if not 0 <= source < members.size:
        raise ValueError(f"source={source} is not among the {members.size} ranks")
    return collective(Broadcast(source), x, members)
