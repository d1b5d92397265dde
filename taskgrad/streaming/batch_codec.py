"""Encode items one by one, in batches.

Each item is encoded as soon as it is pulled, so that an input may yield one array again and again,
filled anew. Large buffers are therefore copied. They are frames of their own, out of the pickle
(protocol 5). Runs of small arrays of one dtype and shape are stored as one block without pickling,
which is several times as fast.

The large frames of a batch can be leased: a reader on the same host copies them out of the sender's
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
from taskgrad.cluster.wire.serialize import ATOMS, TensorCloudPickler, TensorPickler
from taskgrad.cluster.wire.thresholds import OWN_FRAME_MIN
from taskgrad.errors import TravelError
from taskgrad.item_errors import is_ctrl_c
from taskgrad.remote_errors import text_of

_RUN_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.float16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)


class ArrayRun(NamedTuple):
    """`length` items in a row that are arrays of one dtype and shape, stored as one block."""

    length: int
    dtype: str
    shape: tuple[int, ...]
    torch: bool


class PickleRun(NamedTuple):
    """`length` items in a row that are pickled."""

    length: int


class Batch:
    """Encoded items.

    The first frame has the pickles and the blocks of small arrays, in order of the items. For each
    pickle `ends` has its end and `counts` the number of other frames that belong to it.
    """

    __slots__ = ("counts", "ends", "frames", "runs", "token")

    def __init__(
        self,
        runs: list[ArrayRun | PickleRun],
        ends: array[int],
        counts: array[int],
        frames: list[Any],
        token: ValidityToken | None = None,
    ) -> None:
        self.runs = runs
        self.ends = ends
        self.counts = counts
        self.frames = frames
        self.token = token

    def __len__(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def nbytes(self) -> int:
        """The bytes of all its frames, leased ones too."""
        return sum(
            frame.nbytes if isinstance(frame, RemoteBuffer) else len(frame) for frame in self.frames
        )

    def __iter__(self) -> Iterator[Any]:
        """The items, decoded one by one; TravelError if one cannot be unpickled here."""
        data, *buffers = self.frames
        view = memoryview(data)
        rest = iter(buffers)
        pickled = zip(self.ends, self.counts, strict=True)
        start = 0
        for run in self.runs:
            if isinstance(run, ArrayRun):
                end = start + run.length * _run_nbytes(run)
                yield from _arrays(run, view[start:end])
                start = end
                continue
            for end, count in itertools.islice(pickled, run.length):
                yield _loads(view[start:end], [next(rest) for _ in range(count)])
                start = end

    def leased(self, lease: BufferLease) -> Batch:
        """The same with addresses for its large frames, which the lease keeps in memory."""
        frames = [p if len(p) < OWN_FRAME_MIN else lease.add(memoryview(p)) for p in self.frames]
        return Batch(self.runs, self.ends, self.counts, frames, lease.token)

    def fetch(self) -> Batch:
        """The same with its leased frames read out of the sender's memory.

        Raises OSError if they cannot be read here, or the lease has ended.
        """
        if self.token is None:
            return self
        return Batch(self.runs, self.ends, self.counts, read_leased(self.token, self.frames))

    def __reduce_ex__(self, protocol: Any) -> Any:
        frames = [
            pickle.PickleBuffer(p) if protocol >= 5 and isinstance(p, memoryview) else p
            for p in self.frames
        ]
        return Batch, (self.runs, self.ends, self.counts, frames, self.token)


@dask_serialize.register(Batch)
def _serialize(batch: Batch) -> tuple[dict[str, Any], list[Any]]:
    whole = [f for f in batch.frames if not isinstance(f, RemoteBuffer)]
    leased = [f if isinstance(f, RemoteBuffer) else None for f in batch.frames]
    fields = batch.runs, batch.ends, batch.counts, leased, batch.token
    return {"fields": pickle.dumps(fields)}, whole


@dask_deserialize.register(Batch)
def _deserialize(header: dict[str, Any], frames: list[Any]) -> Batch:
    runs, ends, counts, leased, token = pickle.loads(header["fields"])
    rest = iter(frames)
    frames = [next(rest) if f is None else f for f in leased]
    return Batch(runs, ends, counts, frames, token)


def _run_nbytes(run: ArrayRun) -> int:
    return math.prod(run.shape) * np.dtype(run.dtype).itemsize


def _arrays(run: ArrayRun, view: memoryview) -> Iterator[Any]:
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


class BatchEncoder:
    """Encodes items into a batch, one by one."""

    def __init__(self) -> None:
        self.count = 0
        """Items so far."""
        self.nbytes = 0
        """Their bytes."""
        self._runs: list[ArrayRun | PickleRun] = []
        self._run: Any = None  # of the item before: what its like must have, and how many there are
        self._length = 0
        self._ends = array("Q")
        self._counts = array("L")
        self._data = io.BytesIO()
        self._buffers: list[Any] = []
        self._file = io.BytesIO()
        self._pickler = TensorPickler(self._file, 5, buffer_callback=self._out_of_band)

    def add(self, item: Any) -> None:
        """Encode an item. If pickle raises, the batch is as it was before."""
        kind = type(item)
        if kind is np.ndarray:
            run = _as_run(item, False)
        elif kind is torch.Tensor:
            run = _tensor_as_run(item)
        else:
            run = None
        if run is None:
            self._add_pickle(item)
            like = None
        else:
            array, like = run
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
        if type(item) in ATOMS:
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
        TensorCloudPickler(file, 5, buffer_callback=self._out_of_band).dump(item)
        return file.getvalue()

    def _end_run(self) -> None:
        if self._length:
            like, count = self._run, self._length
            self._runs.append(PickleRun(count) if like is None else ArrayRun(count, *like))

    def _out_of_band(self, buffer: pickle.PickleBuffer) -> bool:
        """Callback of pickle for each buffer: True if it goes into the pickle itself."""
        raw = buffer.raw()
        if raw.nbytes < OWN_FRAME_MIN:
            return True
        if not _is_constant(raw):
            raw = _copy(raw)
        self._buffers.append(raw)
        return False

    def batch(self) -> Batch:
        """The batch; the encoder cannot be used after this."""
        self._end_run()
        frames = [self._data.getvalue(), *self._buffers]
        return Batch(self._runs, self._ends, self._counts, frames)


def _as_run(item: np.ndarray, is_torch: bool) -> Any:
    """A small array that is plain memory, and what arrays in a row with it have in common."""
    dtype = item.dtype
    if (
        dtype.kind not in "biufc"
        or not 0 < item.nbytes < OWN_FRAME_MIN
        or not item.flags.c_contiguous
    ):
        return None
    return item, (dtype.str, item.shape, is_torch)


def _tensor_as_run(item: torch.Tensor) -> Any:
    plain = (
        item.layout is torch.strided
        and item.device.type == "cpu"
        and item.dtype in _RUN_DTYPES
        and not (item.requires_grad or item.is_conj() or item.is_neg() or item.__dict__)
    )
    return _as_run(item.numpy(), True) if plain else None


def _is_constant(raw: memoryview) -> bool:
    """True for memory that cannot change, of which a read-only view alone is no proof."""
    holder: Any = raw.obj
    while isinstance(holder, np.ndarray | memoryview):
        holder = holder.base if isinstance(holder, np.ndarray) else holder.obj
    return isinstance(holder, bytes)


def _copy(raw: memoryview) -> memoryview:
    copied = torch.empty(raw.nbytes, dtype=torch.uint8, device="cpu").numpy().data
    copied[:] = raw
    return copied


def pack_function(fn: Any) -> Batch:
    """A function as a batch: importable ones by their name, all others whole."""
    buffers: list[Any] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        buffers.append(raw if _is_constant(raw) else _copy(raw))  # workers ask for it later
        return False

    file = io.BytesIO()
    TensorCloudPickler(file, 5, buffer_callback=out_of_band).dump(fn)
    ends, counts = array("Q", [file.tell()]), array("L", [len(buffers)])
    return Batch([PickleRun(1)], ends, counts, [file.getvalue(), *buffers])
