"""Worker: values as frames of bytes, for channels that send tensors of bytes.

A value is pickled with its tensors' memory out of band. The first frame has a fixed size: it says
how long the pickle and each buffer are, and holds the pickle and all small buffers, if they fit.
What does not fit follows in frames of its own.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from taskgrad.cluster.wire.serialize import TensorCloudPickler, TensorPickler, pickle_with

FIRST_FRAME = 4096
"""Bytes of the first frame of each value."""
_HEAD = struct.Struct("<II")  # lengths of the pickle, and of the list of the buffers' lengths
_LENGTH = struct.Struct("<Q")
# Buffers up to so many bytes are part of the first frame, while there is room.
_SMALL = 1024


def pack(value: Any) -> list[torch.Tensor]:
    """The frames of a value, each a one-dimensional tensor of bytes; the first of a fixed size.

    Frames share the memory of the value's tensors.
    """
    try:
        pickled, buffers, _ = pickle_with(TensorPickler, value)
        if b"__main__" in pickled:
            raise TypeError
    except Exception:
        pickled, buffers, _ = pickle_with(TensorCloudPickler, value)
    lengths = b"".join(_LENGTH.pack(b.nbytes) for b in buffers)
    head = _HEAD.pack(len(pickled), len(lengths))
    first = torch.empty(FIRST_FRAME, dtype=torch.uint8)
    room = memoryview(first.numpy().data)
    rest: list[Any] = []
    at = _put(room, 0, head)
    parts: list[Any] = [lengths, pickled, *buffers]
    for part in parts:
        if fits(len(part) if isinstance(part, bytes) else part.nbytes, at):
            at = _put(room, at, part)
        else:
            rest.append(part)
    return [first, *map(_bytes, rest)]


def fits(size: int, at: int) -> bool:
    """True if a part of this size goes into the first frame, of which `at` bytes are taken."""
    return size <= _SMALL and at + size <= FIRST_FRAME


def unpack(first: torch.Tensor, receive: Callable[[torch.Tensor], None]) -> Any:
    """The value of these frames; `receive` fills a tensor of bytes with the next frame."""
    room = memoryview(first.numpy().data)
    pickled, lengths = _HEAD.unpack_from(room)
    at = _HEAD.size
    parts: list[Any] = []
    part: Any
    sizes: Sequence[int] = [lengths, pickled]
    i = 0
    while i < len(sizes):
        size = sizes[i]
        if fits(size, at):
            part = bytearray(room[at : at + size])
            at += size
        else:
            frame = torch.empty(size, dtype=torch.uint8)
            receive(frame)
            part = memoryview(frame.numpy().data)
        if i == 0:
            sizes = [lengths, pickled, *(n for (n,) in _LENGTH.iter_unpack(part))]
        parts.append(part)
        i += 1
    return pickle.loads(parts[1], buffers=parts[2:])


def _put(room: memoryview, at: int, part: Any) -> int:
    size = len(part) if isinstance(part, bytes) else part.nbytes
    room[at : at + size] = part
    return at + size


def _bytes(part: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory may not be written
        return torch.frombuffer(part, dtype=torch.uint8)
