"""Basic indexing of sharded tensors: every worker takes its part of the result from its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.arguments import shown, whole
from taskgrad.graph.parts import Cut
from taskgrad.spmd.sharded.layout import Parts, Span
from taskgrad.spmd.sharded.running import call, kept, view
from taskgrad.worker import tensor_parts


def indexed(x: Parts, index: Any) -> Parts:
    """What an index of integers, slices, None and an ellipsis leaves, on the workers that have it.

    An integer for the axis of the parts leaves one copy, on the worker that has it.

    Raises IndexError as torch does; TypeError for other indices.
    """
    entries = _entries(index, len(x.shape))
    result = x.meta()[tuple(entries)]
    if all(isinstance(e, slice) for e in entries) and result.shape == x.shape:
        return x
    at = [i for i, entry in enumerate(entries) if entry is not None]
    if x.axis is None:
        return _taken(
            x, result, None, x.spans, [tuple(entries)] * len(x.parts), range(len(x.parts))
        )
    place = at[x.axis]
    entry = entries[place]
    if isinstance(entry, int):
        entry %= x.shape[x.axis]
        [(holder, part)] = [(i, p) for i, p in enumerate(x.parts) if p.start <= entry < p.stop]
        cut = _with(entries, place, entry - part.start)
        return _taken(x, result, None, [Span(part.worker)], [cut], [holder])
    axis = sum(not isinstance(e, int) for e in entries[:place])
    start, stop, step = entry.indices(x.shape[x.axis]) if entry is not None else (0, 0, 1)
    spans: list[Span] = []
    cuts, holders, before = [], [], 0
    for i, part in enumerate(x.parts):
        first = start + -(-max(part.start - start, 0) // step) * step
        count = len(range(first, min(stop, part.stop), step))
        if count or (i == len(x.parts) - 1 and not spans):
            inside = slice(first - part.start, min(stop, part.stop) - part.start, step)
            cuts.append(_with(entries, place, inside if count else slice(0, 0)))
            spans.append(Span(part.worker, before, before + count))
            holders.append(i)
            before += count
    return _taken(x, result, axis, spans, cuts, holders)


def _entries(index: Any, ndim: int) -> list[int | slice | None]:
    """The index with an entry for each dimension, and None for each new one."""
    given = index if isinstance(index, tuple) else (index,)
    found: list[Any] = []
    for one in given:
        if one is None or one is Ellipsis or isinstance(one, slice):
            found.append(one)
            continue
        try:
            found.append(whole("an index", one))
        except TypeError:
            raise TypeError(
                "a sharded tensor takes integers, slices, None and ... as an index; got "
                f"{shown(one)}. Use .gather() first, or index inside a tg.pmap"
            ) from None
    dots = [i for i, one in enumerate(found) if one is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can have only one ellipsis (...)")
    missing = ndim - sum(one is not None and one is not Ellipsis for one in found)
    if missing < 0:
        raise IndexError(f"too many indices for a tensor of {ndim} dimensions")
    place = dots[0] if dots else len(found)
    return [*found[:place], *[slice(None)] * missing, *found[place + len(dots) :]]


def _with(entries: Sequence[Any], place: int, entry: int | slice) -> Cut:
    return (*entries[:place], entry, *entries[place + 1 :])


def _taken(
    x: Parts,
    result: torch.Tensor,
    axis: int | None,
    spans: Sequence[Span],
    cuts: Sequence[Cut],
    holders: Sequence[int],
) -> Parts:
    calls = [
        call(tensor_parts.copy, span, [view(x.parts[holder], cut)], title="index")
        for span, cut, holder in zip(spans, cuts, holders, strict=True)
    ]
    parts = kept(x.session, spans, calls)
    return Parts(x.session, result.shape, result.dtype, axis, tuple(parts))
