"""Eager gradients: the backward of a chunk's losses, right after its forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.objects import Opaque
from taskgrad.mapping.reducing import Widened
from taskgrad.mapping.segments import Segment, differentiate, on_host, total
from taskgrad.worker.failures import backward_error

# It pays where it takes less than a round trip...
_SECONDS = 0.02
# ... and where the gradients are small beside one.
_BYTES = 1 << 20
_TUPLES = ("tuple", "namedtuple")


@dataclass(frozen=True)
class EagerOptions(Opaque):
    """Whether a chunk's losses are differentiated as soon as it has run.

    Attributes
    ----------
    asked
        Yes, no, or where it pays (None).
    seed
        The cotangent of all losses that the backward is run with.
    predicted
        Whether a backward with that cotangent will likely be asked for, so that it always pays.
    """

    asked: bool | None
    seed: float
    predicted: bool


@dataclass(frozen=True)
class EagerGradients:
    """Gradients for one cotangent of all losses.

    Attributes
    ----------
    leads
        The positions of the losses among the outputs of all segments.
    shared, items
        Of the closed-over tensors, summed, and of the items' tensors. None of the former where the
        worker sums those of several chunks.
    """

    leads: list[int]
    shared: list[Gradient] | None
    items: list[Gradient]


def differentiate_eagerly(
    segments: Sequence[Segment],
    options: EagerOptions,
    seconds: float,
    threads: int,
    title: str,
    address: str,
) -> EagerGradients | None:
    """Gradients, if they were asked for, or if they pay after a forward of so many seconds.

    Raises
    ------
    TypeError
        They were asked for, and some result is no loss.
    LayerError
        They were asked for, and autograd raised.
    """
    if options.asked is False:
        return None
    losses = [_losses(segment) for segment in segments]
    if any(found is None for found in losses):
        if options.asked:
            raise TypeError(
                f"eager_grad=True, and {title!r} gives something that is neither a "
                "0-d tensor that requires grad nor a tuple led by one"
            )
        return None
    pays = options.predicted or (seconds <= _SECONDS and _size(segments) <= _BYTES)
    if not (options.asked or pays):
        return None
    leads = [set(found or ()) for found in losses]
    seeds: list[list[Gradient]] = [
        [torch.full_like(o, options.seed) if i in at else None for i, o in enumerate(p.outputs)]
        for p, at in zip(segments, leads, strict=True)
    ]
    try:
        shared, taken = differentiate(segments, seeds, threads, retain=True)
    except Exception as error:
        if options.asked:
            raise backward_error(error, address, title, None) from error
        return None  # an error of the backward, if one comes
    positions, before = [], 0
    for segment, at in zip(segments, leads, strict=True):
        positions += [before + i for i in sorted(at)]
        before += len(segment.outputs)
    items = [on_host(g) for grads in taken for g in grads]
    return EagerGradients(positions, list(map(on_host, total(shared))), items)


def _size(segments: Sequence[Segment]) -> int:
    tensors = [*segments[0].shared, *(t for segment in segments for t in segment.taken)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _losses(segment: Segment) -> list[int] | None:
    """The positions among a segment's outputs of its results' losses; None if one has none."""
    results, leads, before = segment.results, [], 0
    for structure in results.structures:
        widened = structure.kind == "namedtuple" and structure.context[0] is Widened
        value = structure.children[0] if widened else structure
        first = value.children[0] if value.kind in _TUPLES and value.count else value
        if first.kind != "leaf" or not results.flags[before]:
            return None
        leads.append(before)
        before += structure.count
    outputs = [i for i, flag in enumerate(results.flags) if flag]
    positions = [outputs.index(lead) for lead in leads]
    return positions if all(segment.outputs[i].dim() == 0 for i in positions) else None
