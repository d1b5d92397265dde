"""Worker: tagged values as frames of bytes, for channels that send tensors of bytes.

The first frame holds the tag, says how long the parts of the value are, and has those parts that
are small, as far as there is room; the others follow in frames of their own. A dense tensor in the
order of its dimensions is one part, its memory. Any other value is pickled, with the memory of its
tensors out of band.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.cluster.wire.serialize import (
    TensorCloudPickler,
    TensorPickler,
    dumps_whole,
    pickle_with,
)

FIRST_FRAME = 1 << 16
"""The most bytes of the first frame of a value."""

Tag = tuple[int, int, int]
"""Three numbers below 2**32 that say what a value is."""

_HEAD = struct.Struct("<IIIBBH")  # the tag; kind; dtype of a tensor; number of lengths that follow
_TENSOR, _PICKLED = 0, 1
# Parts up to so many bytes are in the first frame, if there is room.
_SMALL = 1 << 15
# A part of the first frame is copied out of it up to so many bytes; a larger one keeps the frame.
_COPIED = 1 << 12
_ALIGNMENT = 64
# As many lengths fit into the first frame, and leave room for small parts.
_MAX_LENGTHS = 128

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def pack(tag: Tag, value: Any) -> list[torch.Tensor]:
    """The frames of a value, each a one-dimensional tensor of bytes.

    All but the first share the memory of the value's tensors.
    """
    lengths: Sequence[int]
    if type(value) is torch.Tensor and _is_plain(value):
        kind, code, lengths = _TENSOR, _CODES[value.dtype], value.shape
        parts = [value.detach().reshape(-1).view(torch.uint8).numpy().data] if value.numel() else []
    else:
        kind, code = _PICKLED, 0
        parts = _pickled(value)
        lengths = [len(part) for part in parts]
    first = torch.empty(FIRST_FRAME, dtype=torch.uint8)
    room = memoryview(first.numpy().data)
    _HEAD.pack_into(room, 0, *tag, kind, code, len(lengths))
    struct.pack_into(f"<{len(lengths)}Q", room, _HEAD.size, *lengths)
    at = _aligned(_HEAD.size + 8 * len(lengths))
    rest = []
    for part in parts:
        size = len(part)
        if _fits(size, at):
            room[at : at + size] = part
            at = _aligned(at + size)
        else:
            rest.append(_bytes(part))
    return [first[:at], *rest]


def tag_of(first: torch.Tensor) -> Tag:
    """The tag of the value whose first frame this is."""
    a, b, c, *_ = _HEAD.unpack_from(first.numpy().data)
    return a, b, c


def rest_of(first: torch.Tensor) -> list[torch.Tensor]:
    """Memory for the frames that follow this one."""
    sizes, at = _sizes(first)
    found = []
    for size in sizes:
        if _fits(size, at):
            at = _aligned(at + size)
        else:
            found.append(torch.empty(size, dtype=torch.uint8))
    return found


def unpack(frames: Sequence[torch.Tensor]) -> Any:
    """The value of these frames, whose memory it may keep."""
    first, *rest = frames
    room = memoryview(first.numpy().data)
    sizes, at = _sizes(first)
    following = iter(rest)
    parts: list[Any] = []
    for size in sizes:
        if _fits(size, at):
            part = first[at : at + size]
            parts.append(part.clone() if size <= _COPIED else part)
            at = _aligned(at + size)
        else:
            parts.append(next(following))
    _, _, _, kind, code, count = _HEAD.unpack_from(room)
    if kind == _TENSOR:
        shape = struct.unpack_from(f"<{count}Q", room, _HEAD.size)
        return (
            parts[0].view(_DTYPES[code]).view(shape)
            if parts
            else torch.empty(shape, dtype=_DTYPES[code])
        )
    head, *buffers = (part.numpy().data for part in parts)
    return pickle.loads(head, buffers=buffers)


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


def _sizes(first: torch.Tensor) -> tuple[list[int], int]:
    """The bytes of each part, and where the first small one of them begins."""
    room = first.numpy().data
    *_, kind, code, count = _HEAD.unpack_from(room)
    found = struct.unpack_from(f"<{count}Q", room, _HEAD.size)
    at = _aligned(_HEAD.size + 8 * count)
    if kind == _PICKLED:
        return list(found), at
    total = _DTYPES[code].itemsize
    for length in found:
        total *= length
    return ([total] if total else []), at


def _aligned(at: int) -> int:
    return (at + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _fits(size: int, at: int) -> bool:
    """True if a part of this size is in the first frame, of which `at` bytes are taken."""
    return size <= _SMALL and at + size <= FIRST_FRAME


def _bytes(part: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory may not be written
        return torch.frombuffer(part, dtype=torch.uint8)
