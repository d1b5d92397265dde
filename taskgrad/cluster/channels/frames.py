"""Worker: tagged values as bytes, for channels that are streams of bytes.

A value is a head and parts. The head has the tag and says what the value is and how long its parts
are. A dense tensor in the order of its dimensions is one part, its memory. Any other value is
pickled, with the memory of its tensors out of band. Of a large part only the address may be sent,
to a process that can read this one's memory; it answers with a receipt when it has. So it does for
tensors on a device in slots (`taskgrad.cluster.channels.device_slots`). What goes over a process
group (`taskgrad.cluster.channels.device_group`) follows when the receiver asks for it.
"""

from __future__ import annotations

import io
import logging
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from taskgrad.cluster.channels.device_slots import Placed, Reference
from taskgrad.cluster.wire.process_memory import address_of, read
from taskgrad.cluster.wire.serialize import (
    TensorCloudPickler,
    TensorPickler,
    dumps_whole,
    pickle_with,
)
from taskgrad.cluster.wire.tensors import is_pinned

logger = logging.getLogger("taskgrad")

Tag = tuple[int, int, int]
"""Three numbers below 2**32 that say what a value is."""

# The tag; kind; dtype of a tensor; and of the numbers that follow, how many are its shape, and how
# many the lengths of parts.
_HEAD = struct.Struct("<IIIBBHH")
_ADDRESS = struct.Struct("<Q")
_TENSOR, _PICKLED, _RECEIPT, _PLACED, _GROUPED = range(5)
_ANNOUNCED = struct.Struct("<QQ")  # of what goes over a group: its number, how many bytes
_MAX_LENGTHS = 128
_BY_ADDRESS = 1 << 63  # in a length: the address comes in place of the part
# Bytes that are received at a time. What is left of a longer part is received where it belongs.
_ROOM = 1 << 16

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class Carried(Protocol):
    """A tensor that a carrier has taken."""

    @property
    def reference(self) -> Reference:
        """Where it is, for the receiver."""


class Carrier(Protocol):
    """Takes tensors of a value on another way than its bytes go."""

    def put(self, flat: torch.Tensor) -> Any:
        """Take a tensor of bytes: a `Carried`; or None, if it is to go with the others."""

    def give_back(self, carried: Any) -> None:
        """The receiver needs this no more, or never will."""


@runtime_checkable
class Announcing(Protocol):
    """A carrier that has all tensors of one value together."""

    def announce(self) -> tuple[int, int]:
        """Their number, and how many bytes they have: the receiver is told."""


@dataclass(frozen=True)
class Packed:
    """A value as bytes: its head and parts, which share the memory of the value's tensors.

    `lent` are the parts of which only the address is among the bytes, `placed` tensors in slots.
    """

    buffers: list[memoryview]
    lent: list[memoryview]
    placed: list[Placed]


def pack(
    tag: Tag, value: Any, *, lend: int | None = None, carrier: Carrier | None = None
) -> Packed:
    """A value as bytes; parts of `lend` bytes or more the receiver reads in this process.

    Tensors on a device go with the carrier, where they can.
    """
    placed: list[Placed] = []
    shape: tuple[int, ...] = ()
    if carrier is not None:
        kind, found, placed = _with_carrier(value, carrier)
        code = 0
        parts = [memoryview(part) for part in found]
    elif type(value) is torch.Tensor and _is_plain(value):
        kind, code, shape = _TENSOR, _CODES[value.dtype], tuple(value.shape)
        parts = [_bytes_of(value)] if value.numel() else []
    else:
        kind, code = _PICKLED, 0
        parts = [memoryview(part) for part in _pickled(value)]
    lent = [] if lend is None else [part for part in parts if len(part) >= lend]
    lengths = [len(part) for part in parts]
    if lent:
        large = [len(part) >= (lend or 0) for part in parts]
        lengths = [n | _BY_ADDRESS if at else n for n, at in zip(lengths, large, strict=True)]
        parts = [
            memoryview(_ADDRESS.pack(address_of(part))) if at else part
            for part, at in zip(parts, large, strict=True)
        ]
    numbers = (*shape, *lengths)
    head = _HEAD.pack(*tag, kind, code, len(shape), len(lengths))
    head += struct.pack(f"<{len(numbers)}Q", *numbers)
    return Packed([memoryview(head), *parts], lent, placed)


def receipt(tag: Tag) -> memoryview:
    """The bytes that say that what was lent for this value has been read."""
    return memoryview(_HEAD.pack(*tag, _RECEIPT, 0, 0, 0))


class Arriving:
    """A value of which the head is here.

    `missing` is the memory for what comes yet, last one first. `is_receipt` says that it is none,
    but a receipt for the value with its tag; `is_lent` that parts of it are to be read; `is_placed`
    that tensors may be in slots; `is_grouped` that they come over a group. In either case `load` is
    to be set to what returns them.
    """

    __slots__ = ("_kind", "_parts", "_remote", "is_receipt", "load", "missing", "tag")

    def __init__(self, head: memoryview) -> None:
        *tag, kind, code, dims, count = _HEAD.unpack_from(head)
        numbers = struct.unpack_from(f"<{dims + count}Q", head, _HEAD.size)
        self.tag: Tag = (tag[0], tag[1], tag[2])
        self.is_receipt = kind == _RECEIPT
        self.load: Callable[[Reference], torch.Tensor] | None = None
        self._kind = kind
        self._remote: list[tuple[bytearray, memoryview]] = []
        lengths = numbers[dims:]
        if kind == _TENSOR:
            self._parts = [torch.empty(numbers[:dims], dtype=_DTYPES[code], device="cpu")]
        else:
            self._parts = [_memory(n & ~_BY_ADDRESS) for n in lengths]
        missing: list[memoryview] = []
        for part, length in zip(self._parts, lengths, strict=False):  # an empty tensor has no part
            if length & _BY_ADDRESS:
                address = bytearray(_ADDRESS.size)
                self._remote.append((address, _bytes_of(part)))
                missing.append(memoryview(address))
            elif length:
                missing.append(_bytes_of(part))
        self.missing = missing[::-1]

    @property
    def is_lent(self) -> bool:
        """True if parts are to be read from the sender's memory."""
        return bool(self._remote)

    def read(self, pid: int, guard: int, nbytes: int) -> bytes:
        """Read what is lent from the memory of this process; OSError if that fails.

        Returns so many bytes from the address `guard` there, read last: they tell whether the rest
        was still there.
        """
        last = bytearray(nbytes)
        parts = [(_ADDRESS.unpack(address)[0], to) for address, to in self._remote]
        read(pid, parts)
        read(pid, [(guard, memoryview(last))])
        self._remote = []
        return bytes(last)

    @property
    def is_placed(self) -> bool:
        """True if tensors of it may be in the sender's slots."""
        return self._kind == _PLACED

    @property
    def is_grouped(self) -> bool:
        """True if tensors of it come over a group."""
        return self._kind == _GROUPED

    @property
    def announced(self) -> tuple[int, int]:
        """Of what comes over a group: its number, and how many bytes."""
        number, nbytes = _ANNOUNCED.unpack(self._parts[-1].numpy().data)
        return number, nbytes

    def value(self) -> Any:
        """The value, once nothing is missing or lent; it may keep the memory of the parts."""
        if self._kind == _TENSOR:
            return self._parts[0]
        head, *buffers = (part.numpy().data for part in self._parts)
        if self.load is None:
            return pickle.loads(head, buffers=buffers)
        unpickler = _FromCarrier(io.BytesIO(head), buffers=buffers)
        unpickler.load_carried = self.load
        return unpickler.load()


class _FromCarrier(pickle.Unpickler):
    load_carried: Callable[[Reference], torch.Tensor]

    def persistent_load(self, reference: Any) -> torch.Tensor:
        return self.load_carried(Reference(*reference))


class Stream:
    """The values that come on a connection, from bytes as they are received."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray(_ROOM))
        self._stop = 0  # of what is in the room
        self._arriving: Arriving | None = None
        self.has_had_large = False  # a part that does not fit in the room

    @property
    def is_halfway(self) -> bool:
        """True if a part of a value is here."""
        return self._arriving is not None or self._stop > 0

    def room(self) -> memoryview:
        """Memory for the next bytes, to be given to `received` when some of it is filled."""
        arriving = self._arriving
        if arriving is not None and len(arriving.missing[-1]) >= _ROOM:
            self.has_had_large = True
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
    *_, dims, count = _HEAD.unpack_from(room)
    size: int = _HEAD.size + 8 * (dims + count)
    return size if len(room) >= size else None


def _is_plain(t: torch.Tensor) -> bool:
    """True for a tensor that is its memory, its dtype and its shape, and no more."""
    return (
        t.layout is torch.strided
        and t.device.type == "cpu"
        and t.dtype in _CODES
        and t.is_contiguous()
        and not (t.requires_grad or t.is_conj() or t.is_neg() or t.__dict__ or is_pinned(t))
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


class _ByReference:
    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, Reference) else None


class _ToCarrier(_ByReference, TensorPickler):
    pass


class _ToCarrierCloud(_ByReference, TensorCloudPickler):
    pass


def _with_carrier(value: Any, carrier: Carrier) -> tuple[int, list[Any], list[Placed]]:
    """As `_pickled`, with tensors on a device in the carrier: the kind of value, and what `Packed`
    has as placed."""
    carried: list[Any] = []

    def put(flat: torch.Tensor) -> Reference | None:
        found: Carried | None = carrier.put(flat)
        if found is None:
            return None
        carried.append(found)
        return found.reference

    def drop() -> None:
        while carried:
            carrier.give_back(carried.pop())

    try:
        try:
            pickled, buffers, _ = pickle_with(_ToCarrier, value, put)
            if b"__main__" in pickled:
                raise TypeError
        except Exception:
            drop()
            pickled, buffers, _ = pickle_with(_ToCarrierCloud, value, put)
    except Exception:
        drop()
        raise
    parts = [pickled, *buffers]
    if len(parts) > _MAX_LENGTHS:
        drop()
        return _PICKLED, _pickled(value), []
    if not carried:
        return _PICKLED, parts, []
    if not isinstance(carrier, Announcing):
        return _PLACED, parts, carried
    try:
        announced = _ANNOUNCED.pack(*carrier.announce())
    except Exception:  # there is no memory left, for one
        logger.debug("no group for a value", exc_info=True)
        return _PICKLED, _pickled(value), []
    return _GROUPED, [*parts, announced], []


def _memory(nbytes: int) -> torch.Tensor:
    # For large parts NumPy asks the system for huge pages, which take less time to map and to read.
    return torch.from_numpy(np.empty(nbytes, np.uint8))


def _bytes_of(t: torch.Tensor) -> memoryview:
    found: memoryview = t.view(-1).view(torch.uint8).numpy().data
    return found
