"""Copies of what ranks send, so that they need not wait until it has arrived."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

Payload = list[torch.Tensor]

# Messages up to this many bytes are copied, and those within a worker, where none is sent.
_SMALL = 1 << 16


def copied(
    payloads: Mapping[int, Payload], here: Collection[int]
) -> tuple[dict[int, Payload], set[int]]:
    """The payloads for ranks, copied if they are small or for a rank `here`; the ranks of others.

    What several ranks get is copied once.
    """
    copies: dict[tuple[int, ...], Payload] = {}
    found: dict[int, Payload] = {}
    for rank, payload in payloads.items():
        if rank in here or sum(t.nbytes for t in payload) <= _SMALL:
            tensors = tuple(map(id, payload))
            if tensors not in copies:
                copies[tensors] = [t.clone() for t in payload]
            found[rank] = copies[tensors]
    borrowed = payloads.keys() - found.keys()
    return {rank: found.get(rank, payload) for rank, payload in payloads.items()}, borrowed
