"""Run functions on the workers that hold parts, and keep what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.executors.held_parts import hold_as
from taskgrad.executors.part_calls import run_parts
from taskgrad.graph.nodes import Node
from taskgrad.graph.parts import Cut, KeptPart, PartCall, PartView
from taskgrad.spmd.sharded.layout import Part, Parts, Span
from taskgrad.worker import tensor_parts
from taskgrad.worker.parts import TensorInfo

# Bytes that a program sends. A task's result the driver may read in the worker's memory.
_MOST_DIRECT = 1 << 20


def call(
    function: Callable[..., Any],
    span: Span,
    inputs: Sequence[Node],
    *,
    title: str,
    stays: bool = True,
    **arguments: Any,
) -> PartCall:
    """A call of a function of `taskgrad.worker` where this span is; it does not run yet."""
    return PartCall(
        function, span.worker.address, inputs, arguments, stays=stays, title=f"sharded:{title}"
    )


def view(part: Part, cut: Cut = ()) -> PartView:
    """A part, or what this index leaves of it, as an input of a call on its worker."""
    return PartView(part.node, 0, cut)


def kept(owner: Session, spans: Sequence[Span], calls: Sequence[PartCall]) -> list[Part]:
    """Run calls whose results stay, one for each span; returns the parts.

    Raises what a call raises; WorkerLostError if a worker is gone.
    """
    run_parts(owner, calls)
    return held(owner, spans, calls)


def held(owner: Session, spans: Sequence[Span], calls: Sequence[PartCall]) -> list[Part]:
    """The parts that calls have made, which have run."""
    parts = []
    for span, made in zip(spans, calls, strict=True):
        # Not the call: that has what it was made of.
        node = KeptPart(made.key, made.worker)
        hold_as(owner, node, made)
        parts.append(Part(span.worker, span.start, span.stop, node))
    return parts


def values(owner: Session, calls: Sequence[PartCall], *, direct: bool = True) -> list[Any]:
    """Run calls side by side; returns their results, or of those that stay the descriptions."""
    return run_parts(owner, calls, direct=direct)(calls)


def described(
    owner: Session, spans: Sequence[Span], calls: Sequence[PartCall]
) -> tuple[list[Part], list[TensorInfo]]:
    """As `kept`, with the shape and dtype of each part."""
    found = values(owner, calls)
    return held(owner, spans, calls), found


def gathered(x: Parts) -> torch.Tensor:
    """The tensor, on the driver."""
    parts = x.parts if x.axis is not None else x.parts[:1]
    found = values(
        x.session,
        [
            call(tensor_parts.give, part, [view(part)], title="gather", stays=False)
            for part in parts
        ],
        direct=x.shape.numel() * x.dtype.itemsize <= _MOST_DIRECT,
    )
    if len(found) == 1:
        one: torch.Tensor = found[0]
        return one
    return torch.cat(found, x.axis or 0)
