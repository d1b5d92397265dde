"""Cotangents as they are sent to a worker: what is the same for many results is sent once.

The losses of a sum all have the same cotangent; so a backward of a thousand items sends no more
than that of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

Gradient = torch.Tensor | None


def encode(cotangents: Sequence[Gradient]) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
    """How often in a row each of the distinct cotangents stands (-1: there is none), and these."""
    distinct: dict[Any, int] = {}
    tensors: list[torch.Tensor] = []
    places = []
    for cotangent in cotangents:
        if cotangent is None:
            places.append(-1)
            continue
        key = _key(cotangent)
        if key not in distinct:
            distinct[key] = len(tensors)
            tensors.append(cotangent)
        places.append(distinct[key])
    return [(place, len(list(run))) for place, run in itertools.groupby(places)], tensors


def decode(runs: Sequence[tuple[int, int]], tensors: Sequence[torch.Tensor]) -> list[Gradient]:
    """Undo `encode`."""
    return [None if at < 0 else tensors[at] for at, count in runs for _ in range(count)]


def _key(cotangent: torch.Tensor) -> Any:
    """Equal for cotangents that are the same: numbers by their bits, others by identity."""
    if cotangent.dim() or cotangent.layout is not torch.strided or cotangent.device.type != "cpu":
        return id(cotangent)
    bits = cotangent.detach().resolve_conj().resolve_neg().reshape(1).view(torch.uint8)
    return cotangent.dtype, bytes(bits.tolist())
