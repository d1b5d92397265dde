"""Gradients of a chunk's losses made as soon as it has run, before anybody asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from taskgrad.mapping.reducing import Widened
from taskgrad.mapping.segments import Gradient, Piece, differentiate, total
from taskgrad.mapping.spec import Work
from taskgrad.worker.failures import backward_error

# It pays where it takes less than a round trip...
_SECONDS = 0.02
# ... and where the gradients are small beside one.
_BYTES = 1 << 20
_TUPLES = ("tuple", "namedtuple")


@dataclass(frozen=True)
class Eager:
    """Gradients for one cotangent of all losses.

    Attributes
    ----------
    leads
        The positions of the losses among the outputs of all pieces.
    shared, items
        Of what the pieces share, added up, and of the items' tensors.
    """

    leads: list[int]
    shared: list[Gradient]
    items: list[Gradient]


def differentiate_at_once(
    work: Work, pieces: Sequence[Piece], seconds: float, threads: int, address: str
) -> Eager | None:
    """Gradients, if they were asked for, or if they pay after a forward of so many seconds here.

    Raises
    ------
    TypeError
        They were asked for, and some result is no loss.
    LayerError
        They were asked for, and autograd raised.
    """
    if work.eager is False:
        return None
    losses = [_losses(piece) for piece in pieces]
    if any(found is None for found in losses):
        if work.eager:
            raise TypeError(
                f"eager_grad=True, and {work.title!r} gives something that is neither a "
                "0-d tensor that requires grad nor a tuple led by one"
            )
        return None
    if not (work.eager or work.expected or (seconds <= _SECONDS and _size(pieces) <= _BYTES)):
        return None
    leads = [set(found or ()) for found in losses]
    seeds: list[list[Gradient]] = [
        [torch.full_like(o, work.eager_seed) if i in at else None for i, o in enumerate(p.outputs)]
        for p, at in zip(pieces, leads, strict=True)
    ]
    try:
        shared, taken = differentiate(pieces, seeds, threads, retain=True)
    except Exception as error:
        if work.eager:
            raise backward_error(error, address, work.title, None) from error
        return None  # an error of the backward, if one comes
    positions, before = [], 0
    for piece, at in zip(pieces, leads, strict=True):
        positions += [before + i for i in sorted(at)]
        before += len(piece.outputs)
    return Eager(positions, total(shared), [g for grads in taken for g in grads])


def _size(pieces: Sequence[Piece]) -> int:
    tensors = [*pieces[0].shared, *(t for piece in pieces for t in piece.taken)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _losses(piece: Piece) -> list[int] | None:
    """The positions among a piece's outputs of its results' losses; None if one has none."""
    positions, flag = [], 0
    for structure in piece.structures:
        widened = structure.kind == "namedtuple" and structure.context[0] is Widened
        value = structure.children[0] if widened else structure
        first = value.children[0] if value.kind in _TUPLES and value.count else value
        lead = piece.leaves[flag] if first.kind == "leaf" else None
        if not (isinstance(lead, torch.Tensor) and lead.dim() == 0 and piece.flags[flag]):
            return None
        positions.append(flag)
        flag += structure.count
    outputs = [i for i, flagged in enumerate(piece.flags) if flagged]
    return [outputs.index(position) for position in positions]
