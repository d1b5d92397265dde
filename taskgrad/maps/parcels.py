"""Items on their way: each pickled by itself as it is taken, many to a parcel.

An item is what it was when it was taken: a generator that yields one array again and again, filled
anew, gives each of its contents, as in a loop. So large buffers are copied here. They are parts of
their own in the parcel and not in the pickle, as pickle's protocol 5 has it.

A parcel can lend its large parts: whoever reads it on the same host copies them out of the sender's
memory, under a seal as in `taskgrad.cluster.loans`.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from taskgrad.cluster import cross_memory
from taskgrad.cluster.loans import Lent, Seal
from taskgrad.cluster.serialize import TensorCloudPickler, TensorPickler
from taskgrad.errors import TravelError

_LARGE = 64 << 10
"""Bytes from which on a buffer is a part of its own."""
_LENT = 64 << 10
_SEAL = 16


class Parcel:
    """Pickled items: where each ends in the first part, how many of the other parts it has."""

    __slots__ = ("counts", "ends", "parts", "seal")

    def __init__(self, ends: Any, counts: Any, parts: list[Any], seal: Seal | None = None) -> None:
        self.ends = ends
        self.counts = counts
        self.parts = parts
        self.seal = seal

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def nbytes(self) -> int:
        """Of all its parts, lent ones too."""
        return sum(part.nbytes if isinstance(part, Lent) else len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Any]:
        """The items, each made as it is asked for.

        Raises
        ------
        TravelError
            One cannot be unpickled here.
        """
        data, *buffers = self.parts
        view = memoryview(data)
        loads = pickle.loads
        rest = iter(buffers)
        start = 0
        for end, count in zip(self.ends, self.counts, strict=True):
            try:
                if count:
                    item = loads(view[start:end], buffers=[next(rest) for _ in range(count)])
                else:
                    item = loads(view[start:end])
            except Exception as error:
                raise TravelError(
                    f"what arrived cannot be unpickled here ({type(error).__name__}: {error}). Are "
                    "the modules that it needs installed on both sides?"
                ) from error
            yield item
            del item
            start = end

    def fetch(self) -> Parcel:
        """The same with what was lent read out of the sender's memory.

        Raises
        ------
        OSError
            It cannot be read here, or is not there any more.
        """
        if self.seal is None:
            return self
        parts, wanted = [], []
        for part in self.parts:
            if isinstance(part, Lent):
                # From torch, whose memory is aligned, and warm if the process keeps what it frees.
                view = torch.empty(part.nbytes, dtype=torch.uint8).numpy().data
                wanted.append((part.address, view))
                part = view
            parts.append(part)
        cross_memory.read(self.seal.pid, wanted)
        if not self.seal.intact():
            raise OSError("the sender's memory was let go while it was read")
        return Parcel(self.ends, self.counts, parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = [
            pickle.PickleBuffer(p) if protocol >= 5 and isinstance(p, memoryview) else p
            for p in self.parts
        ]
        return Parcel, (self.ends, self.counts, parts, self.seal)


@dask_serialize.register(Parcel)
def _serialize(parcel: Parcel) -> tuple[dict[str, Any], list[Any]]:
    whole = [p for p in parcel.parts if not isinstance(p, Lent)]
    places = [p if isinstance(p, Lent) else None for p in parcel.parts]
    return {"words": pickle.dumps((parcel.ends, parcel.counts, places, parcel.seal))}, whole


@dask_deserialize.register(Parcel)
def _deserialize(header: dict[str, Any], frames: list[Any]) -> Parcel:
    ends, counts, places, seal = pickle.loads(header["words"])
    rest = iter(frames)
    return Parcel(ends, counts, [next(rest) if p is None else p for p in places], seal)


class Lease:
    """Keeps a parcel in this process's memory and its seal whole until `end`."""

    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel
        self._bytes = ctypes.create_string_buffer(os.urandom(_SEAL), _SEAL)
        seal = Seal(os.getpid(), ctypes.addressof(self._bytes), self._bytes.raw)
        self.lent = Parcel(parcel.ends, parcel.counts, list(map(_lend, parcel.parts)), seal)

    def end(self) -> None:
        """Break the seal: what is read from now on is not taken for the parcel."""
        ctypes.memset(self._bytes, 0, _SEAL)

    __del__ = end


def _lend(part: Any) -> Any:
    if len(part) < _LENT:
        return part
    view = memoryview(part)
    return Lent(cross_memory.address_of(view), view.nbytes)


class Packer:
    """Makes a parcel, item by item."""

    def __init__(self) -> None:
        self._ends = array("Q")
        self._counts = array("L")
        self._file = io.BytesIO()
        self._buffers: list[Any] = []
        self._out_of_band = 0
        self._pickler = TensorPickler(self._file, 5, buffer_callback=self._aside)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def nbytes(self) -> int:
        """Of the items so far."""
        return self._file.tell() + self._out_of_band

    def add(self, item: Any, by_value: bool = False) -> None:
        """Take an item; ``by_value`` says that only cloudpickle will do.

        Raises
        ------
        Exception
            What pickle raised; the parcel is as it was before.
        """
        file, pickler = self._file, self._pickler
        start, before = file.tell(), len(self._buffers)
        try:
            if by_value:
                raise pickle.PicklingError
            pickler.dump(item)
            # What is defined in __main__ is not there on a worker.
            if b"__main__" in file.getbuffer()[start:].tobytes():
                raise pickle.PicklingError
        except Exception:
            self._undo(start, before)
            try:
                TensorCloudPickler(file, 5, buffer_callback=self._aside).dump(item)
            except Exception:
                self._undo(start, before)
                raise
        pickler.clear_memo()
        self._ends.append(file.tell())
        self._counts.append(len(self._buffers) - before)

    def _undo(self, start: int, before: int) -> None:
        self._file.seek(start)
        self._file.truncate()
        self._out_of_band -= sum(map(len, self._buffers[before:]))
        del self._buffers[before:]

    def _aside(self, buffer: pickle.PickleBuffer) -> bool:
        """Called by pickle with each buffer; whether it goes into the pickle itself."""
        raw = buffer.raw()
        if raw.nbytes < _LARGE:
            return True
        if not raw.readonly:
            raw = _copy(raw)
        self._buffers.append(raw)
        self._out_of_band += raw.nbytes
        return False

    def parcel(self) -> Parcel:
        """What was taken; the packer is not for use after this."""
        return Parcel(self._ends, self._counts, [self._file.getvalue(), *self._buffers])


def _copy(raw: memoryview) -> memoryview:
    copied = torch.empty(raw.nbytes, dtype=torch.uint8).numpy().data
    copied[:] = raw
    return copied


def pack_function(fn: Any) -> Parcel:
    """A function as a parcel: importable ones by their name, all others whole."""
    packer = Packer()
    packer.add(fn, by_value=True)
    return packer.parcel()
