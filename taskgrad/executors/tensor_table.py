"""Driver: what is known of tensors as they are, for as long as they are there and unchanged.

Torch counts the writes to a tensor, but not those through ``.data`` or NumPy; so its bytes are
compared by a checksum, too, which takes less time than sending them.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from taskgrad.graph.pack import is_plain

T = TypeVar("T")
State = tuple[int, int, torch.Size, torch.dtype]
_Entry = tuple["weakref.ref[torch.Tensor]", State, T]


class TensorTable(Generic[T]):
    """Values by tensor. ``ended(value)`` is called when a tensor ends, or was found changed."""

    def __init__(self, ended: Callable[[T], None] = lambda value: None) -> None:
        self.lock = threading.RLock()  # a tensor may end in any thread, in this one too
        self._ended = ended
        self._entries: dict[int, _Entry[T]] = {}  # by the id of the tensor

    def get(self, tensor: torch.Tensor, state: State, make: Callable[[], T]) -> T:
        """The value for a tensor in this state, as `state_of` has it now; a new one if need be."""
        with self.lock:
            known = self._entries.get(id(tensor))
            if known is not None and known[0]() is tensor and known[1] == state:
                return known[2]
            if known is not None:
                self._ended(known[2])
            this, key = weakref.ref(self), id(tensor)

            def end(reference: weakref.ref[torch.Tensor]) -> None:
                found = this()
                if found is not None:
                    found._end(key, reference)

            made = make()
            self._entries[key] = weakref.ref(tensor, end), state, made
            return made

    def values(self) -> list[T]:
        """All values."""
        with self.lock:
            return [value for _, _, value in self._entries.values()]

    def _end(self, key: int, reference: weakref.ref[torch.Tensor]) -> None:
        with self.lock:
            known = self._entries.get(key)
            if known is not None and known[0] is reference:
                del self._entries[key]
                self._ended(known[2])


def state_of(tensor: torch.Tensor) -> State | None:
    """What tells whether a tensor is what it was; None if nothing does quickly."""
    if not is_plain(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or not tensor.numel():
        return None
    memory: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return tensor._version, zlib.crc32(memory), tensor.shape, tensor.dtype
