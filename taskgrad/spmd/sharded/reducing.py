"""Reductions of sharded tensors, which stay on the workers unless they join their parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.arguments import flag, whole
from taskgrad.graph.parts import PartCall
from taskgrad.graph.reductions import combined, partial_of, reduced
from taskgrad.spmd.sharded.layout import Part, Parts
from taskgrad.spmd.sharded.running import call, kept, values, view
from taskgrad.worker import tensor_parts


def reduction(x: Parts, name: str, dim: Any, keepdim: Any, **options: Any) -> Parts | torch.Tensor:
    """A reduction over some dimensions, or with None over all.

    It stays on the workers if a dimension is left, and the axis of the parts is not among those it
    is over; else it is a tensor on the driver. Raises what torch does for a tensor of this shape
    and dtype.
    """
    keepdim = flag("keepdim", keepdim)
    options = {key: value for key, value in options.items() if value is not None}
    dims = _dims(dim, len(x.shape))
    result = reduced(x.meta(), name, dims, keepdim, options)
    if x.axis in dims:
        return _over_axis(x, name, dims, keepdim, options, result)
    if x.axis is None and not result.ndim:
        [found] = values(x.session, _calls(x, x.parts[:1], name, dims, keepdim, options, False))
        one: torch.Tensor = found
        return one
    axis = x.axis
    if axis is not None and not keepdim:
        axis -= sum(d < axis for d in dims)
    parts = kept(x.session, x.spans, _calls(x, x.parts, name, dims, keepdim, options, True))
    return Parts(x.session, result.shape, result.dtype, axis, tuple(parts))


def _calls(
    x: Parts,
    parts: Sequence[Part],
    name: str,
    dims: tuple[int, ...],
    keepdim: bool,
    options: dict[str, Any],
    stays: bool,
) -> list[PartCall]:
    """The reduction of each of these parts."""
    dtype = reduced(x.meta(), name, dims, keepdim, options).dtype
    return [
        call(
            tensor_parts.reduce,
            part,
            [view(part)],
            title=name,
            stays=stays,
            name=name,
            dims=dims,
            keepdim=keepdim,
            options=options,
            dtype=dtype,
        )
        for part in parts
    ]


def _dims(dim: Any, ndim: int) -> tuple[int, ...]:
    """The dimensions counted from 0; IndexError if there is no such one."""
    if dim is None:
        return tuple(range(ndim))
    given = dim if isinstance(dim, tuple | list) else (dim,)
    found = []
    for one in given:
        at = whole("dim", one)
        if not -max(ndim, 1) <= at < max(ndim, 1):
            raise IndexError(f"the tensor has {ndim} dimensions, and no dimension {at}")
        found.append(at % max(ndim, 1))
    if len(set(found)) < len(found):
        raise ValueError(f"dim has a dimension twice: {dim!r}")
    return tuple(sorted(found)) if found else tuple(range(ndim))


def _over_axis(
    x: Parts,
    name: str,
    dims: tuple[int, ...],
    keepdim: bool,
    options: dict[str, Any],
    result: torch.Tensor,
) -> torch.Tensor:
    """Each part's reduction, joined on the driver in the order of the parts."""
    if len(x.parts) == 1:
        partial, given = name, options
    else:
        partial, given = partial_of(name, x.dtype, options)
    found = values(x.session, _calls(x, x.parts, partial, dims, keepdim, given, False))
    if len(found) == 1:
        one: torch.Tensor = found[0]
        return one
    count = math.prod(x.shape[d] for d in dims)
    with torch.no_grad():
        return combined(found, name, count, given).to(result.dtype)
