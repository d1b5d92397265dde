"""Driver: which tensors the workers of a group keep, so that they are not sent with every call.

A tensor is kept for as long as it exists and is what it was. Torch counts the writes to a tensor,
but not those through ``.data`` or NumPy; so its bytes are compared by a checksum, too, which takes
less time than sending them.
"""

from __future__ import annotations

import itertools
import threading
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from taskgrad.graph.pack import is_plain
from taskgrad.worker.rank_forward import KeptInput

State = tuple[int, int, torch.Size, torch.dtype]


@dataclass
class _Kept:
    """A tensor under its number: what it was when it was sent, and to which ranks."""

    number: int
    tensor: weakref.ref[torch.Tensor]
    state: State
    ranks: set[int] = field(default_factory=set)


class KeptInputs:
    """The tensors that one group keeps; ``drop(numbers)`` has its workers drop some."""

    def __init__(self, drop: Callable[[list[int]], None]) -> None:
        self._drop = drop
        self._kept: dict[int, _Kept] = {}  # by the id of the tensor
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # a tensor may end in any thread, in this one too

    def begin(self) -> CallInputs:
        """The inputs of one call, in which every tensor is checked once."""
        return CallInputs(self)

    def find(self, tensor: torch.Tensor) -> _Kept | None:
        """What is known of a tensor as it is now; None for one that is not kept."""
        state = state_of(tensor)
        if state is None:
            return None
        with self._lock:
            known = self._kept.get(id(tensor))
            if known is not None and known.tensor() is tensor and known.state == state:
                return known
            if known is not None:
                self._drop([known.number])
            this, key = weakref.ref(self), id(tensor)

            def ended(reference: weakref.ref[torch.Tensor]) -> None:
                found = this()
                if found is not None:
                    found._ended(key, reference)

            made = _Kept(next(self._numbers), weakref.ref(tensor, ended), state)
            self._kept[key] = made
            return made

    def _ended(self, key: int, reference: weakref.ref[torch.Tensor]) -> None:
        with self._lock:
            known = self._kept.get(key)
            if known is not None and known.tensor is reference:
                del self._kept[key]
                self._drop([known.number])


class CallInputs:
    """The inputs of one call, by the ranks that take them."""

    def __init__(self, kept: KeptInputs) -> None:
        self._kept = kept
        self._found: dict[int, _Kept | None] = {}

    def given(self, rank: int, tensor: torch.Tensor, value: Any) -> Any:
        """The input of a rank: a reference to what its worker keeps, or the value to be sent."""
        if id(tensor) not in self._found:
            self._found[id(tensor)] = self._kept.find(tensor)
        known = self._found[id(tensor)]
        if known is None:
            return value
        if rank in known.ranks:
            return KeptInput(known.number)
        known.ranks.add(rank)
        return KeptInput(known.number, value)


def state_of(tensor: torch.Tensor) -> State | None:
    """What tells whether a tensor is what it was; None if nothing does quickly."""
    if not is_plain(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or not tensor.numel():
        return None
    memory: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return tensor._version, zlib.crc32(memory), tensor.shape, tensor.dtype
