"""Worker: tagged values as bytes, for channels that are streams of bytes.

A value is a head and parts. The head has the tag and says what the value is and how long its parts
are. A dense tensor in the order of its dimensions is one part, its memory. Any other value is
pickled, with the memory of its tensors out of band.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from taskgrad.cluster.wire.serialize import (
    TensorCloudPickler,
    TensorPickler,
    dumps_whole,
    pickle_with,
)

Tag = tuple[int, int, int]
"""Three numbers below 2**32 that say what a value is."""

_HEAD = struct.Struct("<IIIBBH")  # the tag; kind; dtype of a tensor; number of lengths that follow
_TENSOR, _PICKLED = 0, 1
_MAX_LENGTHS = 128
# Bytes that are received at a time. What is left of a longer part is received where it belongs.
_ROOM = 1 << 16

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def pack(tag: Tag, value: Any) -> list[memoryview]:
    """A value's bytes: the head, and parts that share the memory of the value's tensors."""
    lengths: Sequence[int]
    if type(value) is torch.Tensor and _is_plain(value):
        kind, code, lengths = _TENSOR, _CODES[value.dtype], value.shape
        parts = [_bytes_of(value)] if value.numel() else []
    else:
        kind, code = _PICKLED, 0
        parts = [memoryview(part) for part in _pickled(value)]
        lengths = [len(part) for part in parts]
    head = _HEAD.pack(*tag, kind, code, len(lengths)) + struct.pack(f"<{len(lengths)}Q", *lengths)
    return [memoryview(head), *parts]


class Arriving:
    """A value of which the head is here; `missing` is the memory for its parts, last one first."""

    __slots__ = ("_code", "_parts", "_shape", "missing", "tag")

    def __init__(self, head: memoryview) -> None:
        *tag, kind, code, count = _HEAD.unpack_from(head)
        lengths = struct.unpack_from(f"<{count}Q", head, _HEAD.size)
        self.tag: Tag = (tag[0], tag[1], tag[2])
        self._parts: list[torch.Tensor]
        if kind == _TENSOR:
            self._parts = [torch.empty(lengths, dtype=_DTYPES[code])]
        else:
            self._parts = [torch.empty(length, dtype=torch.uint8) for length in lengths]
        self._code = kind
        self.missing = [_bytes_of(part) for part in reversed(self._parts) if part.numel()]

    def value(self) -> Any:
        """The value, once nothing is missing; it may keep the memory of the parts."""
        if self._code == _TENSOR:
            return self._parts[0]
        head, *buffers = (part.numpy().data for part in self._parts)
        return pickle.loads(head, buffers=buffers)


class Stream:
    """The values that come on a connection, from bytes as they are received."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray(_ROOM))
        self._stop = 0  # of what is in the room
        self._arriving: Arriving | None = None

    @property
    def is_halfway(self) -> bool:
        """True if a part of a value is here."""
        return self._arriving is not None or self._stop > 0

    def room(self) -> memoryview:
        """Memory for the next bytes, to be given to `received` when some of it is filled."""
        arriving = self._arriving
        if arriving is not None and len(arriving.missing[-1]) >= _ROOM:
            return arriving.missing[-1]
        return self._room[self._stop :]

    def received(self, room: memoryview, count: int) -> Iterator[Arriving]:
        """So many bytes came into this room; yields the values that are complete with them."""
        arriving = self._arriving
        if arriving is not None and room is arriving.missing[-1]:
            if self._fill(arriving, room[count:]):
                yield arriving
            return
        room, self._stop = self._room[: self._stop + count], 0
        while len(room):
            if self._arriving is None:
                size = _head_size(room)
                if size is None:
                    self._stop = len(room)
                    self._room[: self._stop] = bytes(room)
                    return
                self._arriving, room = Arriving(room[:size]), room[size:]
            arriving = self._arriving
            while arriving.missing and len(room):
                part = arriving.missing[-1]
                count = min(len(part), len(room))
                part[:count] = room[:count]
                room = room[count:]
                self._fill(arriving, part[count:])
            if not arriving.missing:
                self._arriving = None
                yield arriving

    def _fill(self, arriving: Arriving, rest: memoryview) -> bool:
        """`rest` of the part is missing now; True if nothing is."""
        if len(rest):
            arriving.missing[-1] = rest
            return False
        arriving.missing.pop()
        if not arriving.missing:
            self._arriving = None
        return not arriving.missing


def _head_size(room: memoryview) -> int | None:
    """The bytes of the head that begins here; None if not all of it is."""
    if len(room) < _HEAD.size:
        return None
    *_, count = _HEAD.unpack_from(room)
    size: int = _HEAD.size + 8 * count
    return size if len(room) >= size else None


def _is_plain(t: torch.Tensor) -> bool:
    """True for a tensor that is its memory, its dtype and its shape, and no more."""
    return (
        t.layout is torch.strided
        and t.device.type == "cpu"
        and t.dtype in _CODES
        and t.is_contiguous()
        and not (t.requires_grad or t.is_conj() or t.is_neg() or t.__dict__)
        and t.dim() <= _MAX_LENGTHS
    )


def _pickled(value: Any) -> list[Any]:
    """The parts of a pickled value: the pickle, then its buffers."""
    try:
        pickled, buffers, _ = pickle_with(TensorPickler, value)
        if b"__main__" in pickled:
            raise TypeError
    except Exception:
        pickled, buffers, _ = pickle_with(TensorCloudPickler, value)
    if len(buffers) >= _MAX_LENGTHS:
        return [dumps_whole(value)]
    return [pickled, *buffers]


def _bytes_of(t: torch.Tensor) -> memoryview:
    found: memoryview = t.view(-1).view(torch.uint8).numpy().data
    return found
