"""Items on their way: each made bytes by itself as it is taken, many to a parcel.

An item is what it was when it was taken: a generator that yields one array again and again, filled
anew, gives each of its contents, as in a loop. So large buffers are copied here. They are parts of
their own in the parcel and not in the pickle, as pickle's protocol 5 has it. Small arrays, of which
pickle says more than there is in them, are not pickled but laid in rows: several times as fast.

The large parts of a parcel can be leased: a reader on the same host copies them out of the sender's
memory (see `taskgrad.cluster.wire.leases`).
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from taskgrad.cluster.wire.leases import BufferLease, RemoteBuffer, ValidityToken, read_leased
from taskgrad.cluster.wire.serialize import TensorCloudPickler, TensorPickler
from taskgrad.cluster.wire.thresholds import OWN_FRAME_MIN
from taskgrad.errors import TravelError
from taskgrad.item_errors import is_ctrl_c
from taskgrad.remote_errors import text_of

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_ROW_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.float16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)


class Rows(NamedTuple):
    """So many items in a row that are arrays of one dtype and shape, their bytes in a row too."""

    length: int
    dtype: str
    shape: tuple[int, ...]
    torch: bool


class Pickles(NamedTuple):
    """So many items in a row that are pickled."""

    length: int


class Parcel:
    """Items as bytes.

    The first part has the small ones: pickles, and `ends` says where each of them ends and `counts`
    how many of the other parts it has; or the bytes of small arrays.
    """

    __slots__ = ("counts", "ends", "parts", "runs", "token")

    def __init__(
        self,
        runs: list[Rows | Pickles],
        ends: array[int],
        counts: array[int],
        parts: list[Any],
        token: ValidityToken | None = None,
    ) -> None:
        self.runs = runs
        self.ends = ends
        self.counts = counts
        self.parts = parts
        self.token = token

    def __len__(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def nbytes(self) -> int:
        """Of all its parts, leased ones too."""
        return sum(
            part.nbytes if isinstance(part, RemoteBuffer) else len(part) for part in self.parts
        )

    def __iter__(self) -> Iterator[Any]:
        """The items, each made as it is asked for.

        Raises
        ------
        TravelError
            One cannot be unpickled here.
        """
        data, *buffers = self.parts
        view = memoryview(data)
        rest = iter(buffers)
        pickled = zip(self.ends, self.counts, strict=True)
        start = 0
        for run in self.runs:
            if isinstance(run, Rows):
                end = start + run.length * _row_nbytes(run)
                yield from _rows(run, view[start:end])
                start = end
                continue
            for end, count in itertools.islice(pickled, run.length):
                yield _loads(view[start:end], [next(rest) for _ in range(count)])
                start = end

    def leased(self, lease: BufferLease) -> Parcel:
        """The same with its large parts replaced by their addresses, to read until the lease ends.

        The lease keeps them in memory.
        """
        parts = [p if len(p) < OWN_FRAME_MIN else lease.add(memoryview(p)) for p in self.parts]
        return Parcel(self.runs, self.ends, self.counts, parts, lease.token)

    def fetch(self) -> Parcel:
        """The same with its leased parts read out of the sender's memory.

        Raises
        ------
        OSError
            They cannot be read here, or the lease has ended.
        """
        if self.token is None:
            return self
        return Parcel(self.runs, self.ends, self.counts, read_leased(self.token, self.parts))

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = [
            pickle.PickleBuffer(p) if protocol >= 5 and isinstance(p, memoryview) else p
            for p in self.parts
        ]
        return Parcel, (self.runs, self.ends, self.counts, parts, self.token)


@dask_serialize.register(Parcel)
def _serialize(parcel: Parcel) -> tuple[dict[str, Any], list[Any]]:
    whole = [p for p in parcel.parts if not isinstance(p, RemoteBuffer)]
    places = [p if isinstance(p, RemoteBuffer) else None for p in parcel.parts]
    words = parcel.runs, parcel.ends, parcel.counts, places, parcel.token
    return {"words": pickle.dumps(words)}, whole


@dask_deserialize.register(Parcel)
def _deserialize(header: dict[str, Any], frames: list[Any]) -> Parcel:
    runs, ends, counts, places, token = pickle.loads(header["words"])
    rest = iter(frames)
    parts = [next(rest) if p is None else p for p in places]
    return Parcel(runs, ends, counts, parts, token)


def _row_nbytes(run: Rows) -> int:
    return math.prod(run.shape) * np.dtype(run.dtype).itemsize


def _rows(run: Rows, view: memoryview) -> Iterator[Any]:
    block = np.frombuffer(view, run.dtype).reshape(run.length, *run.shape)
    if run.torch:
        for i in range(run.length):
            yield torch.from_numpy(block[i, ...].copy())
    else:
        for i in range(run.length):
            yield block[i, ...].copy()


def _loads(pickled: memoryview, buffers: list[Any]) -> Any:
    try:
        return pickle.loads(pickled, buffers=buffers)
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise TravelError(
            f"what arrived cannot be unpickled here ({text_of(error)}). Are the modules that it "
            "needs installed on both sides?"
        ) from error


class Packer:
    """Makes a parcel, item by item."""

    def __init__(self) -> None:
        self.count = 0
        """Items so far."""
        self.nbytes = 0
        """Their bytes."""
        self._runs: list[Rows | Pickles] = []
        self._run: Any = None  # of the item before: what its like must have, and how many there are
        self._length = 0
        self._ends = array("Q")
        self._counts = array("L")
        self._data = io.BytesIO()
        self._buffers: list[Any] = []
        self._file = io.BytesIO()
        self._pickler = TensorPickler(self._file, 5, buffer_callback=self._aside)

    def add(self, item: Any) -> None:
        """Take an item.

        Raises
        ------
        Exception
            What pickle raised; the parcel is as it was before.
        """
        kind = type(item)
        if kind is np.ndarray:
            row = _as_row(item, False)
        elif kind is torch.Tensor:
            row = _tensor_as_row(item)
        else:
            row = None
        if row is None:
            self._add_pickle(item)
            like = None
        else:
            array, like = row
            self._data.write(array)
            self.nbytes += array.nbytes
        if like == self._run and self._length:
            self._length += 1
        else:
            self._end_run()
            self._run, self._length = like, 1
        self.count += 1

    def _add_pickle(self, item: Any) -> None:
        kept = len(self._buffers)
        try:
            pickled = self._pickle(item)
        except Exception:
            del self._buffers[kept:]
            raise
        self._data.write(pickled)
        self._ends.append(self._data.tell())
        self._counts.append(len(self._buffers) - kept)
        self.nbytes += len(pickled) + sum(map(len, self._buffers[kept:]))

    def _pickle(self, item: Any) -> bytes:
        if type(item) in _ATOMS:
            return pickle.dumps(item, 5)
        kept = len(self._buffers)
        file = self._file
        file.seek(0)
        file.truncate()
        try:
            self._pickler.dump(item)
            pickled = file.getvalue()
        except Exception:
            pickled = b""
        self._pickler.clear_memo()
        # What is defined in __main__ is not there on a worker.
        if pickled and b"__main__" not in pickled:
            return pickled
        del self._buffers[kept:]
        file = io.BytesIO()
        TensorCloudPickler(file, 5, buffer_callback=self._aside).dump(item)
        return file.getvalue()

    def _end_run(self) -> None:
        if self._length:
            like, count = self._run, self._length
            self._runs.append(Pickles(count) if like is None else Rows(count, *like))

    def _aside(self, buffer: pickle.PickleBuffer) -> bool:
        """Called by pickle with each buffer; whether it goes into the pickle itself."""
        raw = buffer.raw()
        if raw.nbytes < OWN_FRAME_MIN:
            return True
        if not _is_constant(raw):
            raw = _copy(raw)
        self._buffers.append(raw)
        return False

    def parcel(self) -> Parcel:
        """What was taken; the packer is not for use after this."""
        self._end_run()
        parts = [self._data.getvalue(), *self._buffers]
        return Parcel(self._runs, self._ends, self._counts, parts)


def _as_row(item: np.ndarray, is_torch: bool) -> Any:
    """A small array that is plain memory, and what arrays in a row with it have in common."""
    dtype = item.dtype
    if (
        dtype.kind not in "biufc"
        or not 0 < item.nbytes < OWN_FRAME_MIN
        or not item.flags.c_contiguous
    ):
        return None
    return item, (dtype.str, item.shape, is_torch)


def _tensor_as_row(item: torch.Tensor) -> Any:
    plain = (
        item.layout is torch.strided
        and item.device.type == "cpu"
        and item.dtype in _ROW_DTYPES
        and not (item.requires_grad or item.is_conj() or item.is_neg() or item.__dict__)
    )
    return _as_row(item.numpy(), True) if plain else None


def _is_constant(raw: memoryview) -> bool:
    """Whether this memory cannot change; a read-only view alone does not prove that."""
    holder: Any = raw.obj
    while isinstance(holder, np.ndarray | memoryview):
        holder = holder.base if isinstance(holder, np.ndarray) else holder.obj
    return isinstance(holder, bytes)


def _copy(raw: memoryview) -> memoryview:
    copied = torch.empty(raw.nbytes, dtype=torch.uint8, device="cpu").numpy().data
    copied[:] = raw
    return copied


def pack_function(fn: Any) -> Parcel:
    """A function as a parcel: importable ones by their name, all others whole."""
    buffers: list[Any] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        buffers.append(raw if _is_constant(raw) else _copy(raw))  # workers ask for it later
        return False

    file = io.BytesIO()
    TensorCloudPickler(file, 5, buffer_callback=aside).dump(fn)
    ends, counts = array("Q", [file.tell()]), array("L", [len(buffers)])
    return Parcel([Pickles(1)], ends, counts, [file.getvalue(), *buffers])
