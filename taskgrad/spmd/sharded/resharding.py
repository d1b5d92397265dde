"""Lay a sharded tensor out in another way: pieces go from worker to worker, not by the driver."""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.graph.nodes import Node
from taskgrad.graph.parts import PartCall
from taskgrad.spmd.sharded.layout import Part, Parts, Span, along
from taskgrad.spmd.sharded.running import call, kept, view
from taskgrad.worker import tensor_parts


def resharded(x: Parts, axis: int | None, spans: Sequence[Span]) -> Parts:
    """The same tensor with these parts; those that are there already stay as they are."""
    if axis == x.axis and list(spans) == x.spans:
        return x
    held = {(axis, part.span): part for part in x.parts} if axis == x.axis else {}
    missing = [span for span in spans if (axis, span) not in held]
    cuts: dict[tuple[int, int, int], PartCall] = {}
    calls = [_assembled(x, axis, span, cuts) for span in missing]
    made = kept(x.session, missing, calls)
    there = {part.span: part for part in made} | {span: part for (_, span), part in held.items()}
    return Parts(x.session, x.shape, x.dtype, axis, tuple([there[span] for span in spans]))


def _assembled(
    x: Parts, axis: int | None, span: Span, cuts: dict[tuple[int, int, int], PartCall]
) -> PartCall:
    """The call that makes one part of what the workers have."""
    if x.axis is None:
        return call(tensor_parts.copy, span, [_copied(x, axis, span, cuts)], title="reshard")
    pieces: list[Node] = []
    for i, part in enumerate(x.parts):
        start, stop = span.start, span.stop
        if axis == x.axis:
            start, stop = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if start >= stop:
                continue
        pieces.append(_piece(part, i, axis, start, stop, span, cuts))
    if not pieces:  # for nothing of an axis of length 0
        pieces.append(_piece(x.parts[0], 0, axis, 0, 0, span, cuts))
    return call(tensor_parts.join, span, pieces, title="reshard", axis=x.axis)


def _copied(
    x: Parts, axis: int | None, span: Span, cuts: dict[tuple[int, int, int], PartCall]
) -> Node:
    """A part of a tensor of which workers have copies: its own worker's, if that has one."""
    own = [i for i, part in enumerate(x.parts) if part.worker.address == span.worker.address]
    source = own[0] if own else len(cuts) % len(x.parts)
    return _piece(x.parts[source], source, axis, span.start, span.stop, span, cuts)


def _piece(
    part: Part,
    source: int,
    axis: int | None,
    start: int,
    stop: int,
    span: Span,
    cuts: dict[tuple[int, int, int], PartCall],
) -> Node:
    """What a part has between two indices: read where it is, or sent to the worker of the span."""
    index = along(axis, start, stop)
    if part.worker.address == span.worker.address:
        return view(part, index)
    known = source, start, stop
    if known not in cuts:
        cuts[known] = call(tensor_parts.copy, part, [view(part, index)], title="send", stays=False)
    return cuts[known]
