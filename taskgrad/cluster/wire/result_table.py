"""Results on a worker's shelf: who can read its memory takes them, and does not ask.

To ask for a result and be answered takes longer than to copy it: two processes wake, twice each. So
a worker that has readers (see `taskgrad.cluster.wire.message_leases`) shows them what it computed:

    a table in its memory              an item
    ┌─────────┬──────┬────────────┐    ┌──────┬───────────────────────────────────┐
    │ a key's │ seal │ where its  │ ─▶ │ seal │ a pickle that says where its      │
    │ digest  │      │ item lies  │    │      │ tensors lie in the same memory    │
    └─────────┴──────┴────────────┘    └──────┴───────────────────────────────────┘

A reader looks into the table, reads the item, then the tensors, then the seal again: if that is
whole still, all else was there all the time. The seal is broken before any of it goes: when a
tensor of the result dies, as its key was released or it was spilled to disk. Whatever is not found,
or not whole, is asked for as ever.

Only tensors as they leave a task are shown, and lists and tuples of them: what is sent without a
copy, and owns no more than its memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import hashlib
import logging
import os
import pickle
import struct
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from distributed import Worker

from taskgrad.cluster import internals
from taskgrad.cluster.wire import message_leases, process_memory, thresholds
from taskgrad.cluster.wire.leases import (
    TOKEN_BYTES,
    BufferLease,
    RemoteBuffer,
    ValidityToken,
    read_leased,
)
from taskgrad.cluster.wire.message_leases import Lender, receive
from taskgrad.cluster.wire.serialize import TensorPickler, pickle_with
from taskgrad.cluster.wire.tensors import lies_ready

logger = logging.getLogger("taskgrad")

SLOTS = 64
"""Results that a shelf holds; the oldest makes room. Each costs a few hundred bytes."""
# The message that a result is there goes out first. Then it is a millisecond until somebody is told
# to take it, and to make an item would hold it up.
_TURNS = 4
_RECORD = struct.Struct("16s16sQQ")  # digest, seal, address and bytes of the item
_TABLE = SLOTS * _RECORD.size

_shelves: weakref.WeakKeyDictionary[Worker, Shelf] = weakref.WeakKeyDictionary()


class Place(NamedTuple):
    """Where a shelf's table lies, and what the digests of its keys begin with."""

    pid: int
    address: int
    salt: bytes

    def digest(self, key: Any) -> bytes:
        """What stands for a key; in other memory than this shelf's it does not come up."""
        return hashlib.blake2b(repr(key).encode(), digest_size=TOKEN_BYTES, key=self.salt).digest()


class _Item:
    """A result that is shown, for as long as all of its tensors live."""

    def __init__(self, slot: int, tensors: list[torch.Tensor], pickled: bytes) -> None:
        self.slot = slot
        self.lease = lease = BufferLease(pickled)
        self._watched = [weakref.ref(t, lambda _died: lease.end()) for t in tensors]


class Shelf:
    """What one worker shows to its readers."""

    def __init__(self, worker: Worker, readers: Collection[str]) -> None:
        self._worker = weakref.proxy(worker)
        self._readers = readers
        self._table = ctypes.create_string_buffer(_TABLE)
        self.place = Place(os.getpid(), ctypes.addressof(self._table), os.urandom(TOKEN_BYTES))
        self._items: OrderedDict[Any, _Item] = OrderedDict()
        self._free = list(range(SLOTS))
        self._closed = False

    def show(self, key: Any, value: Any) -> None:
        """Show a result under its key, if it is of those that can be."""
        self.remove(key)
        tensors = _tensors_of(value)
        if (
            not 0 < len(tensors) <= thresholds.INSPECTED_VALUES_MAX
            or sum(t.nbytes for t in tensors) > thresholds.LEASE_MESSAGE_MAX
        ):
            return
        if not self._free:
            self.remove(next(iter(self._items)))
        pickled = _where(value)
        item = self._items[key] = _Item(self._free.pop(), tensors, pickled)
        token = item.lease.token
        where = token.address, len(pickled)
        self._write(item.slot, self.place.digest(key), token.content, *where)

    def moved(self, key: Any, start: str, finish: str) -> None:
        """A task of the worker went from one state to another: show its result, or no more."""
        if start == "memory":
            self.remove(key)
        elif finish == "memory" and start != "flight" and self._readers:
            self._show(key, _TURNS)

    def _show(self, key: Any, turns: int) -> None:
        """After so many turns of the event loop."""
        if turns:
            asyncio.get_running_loop().call_soon(self._show, key, turns - 1)
        elif not self._closed:
            for value in internals.held_in_memory(self._worker, [key]):
                self.show(key, value)

    def remove(self, key: Any) -> None:
        """Show it no more, if it is shown."""
        item = self._items.pop(key, None)
        if item is not None:
            item.lease.end()
            self._write(item.slot, b"", b"", 0, 0)
            self._free.append(item.slot)

    def _write(self, slot: int, *record: Any) -> None:
        _RECORD.pack_into(self._table, slot * _RECORD.size, *record)

    def close(self) -> None:
        """Show nothing any more."""
        self._closed = True
        for key in list(self._items):
            self.remove(key)


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a value that is nothing but those; else none of them."""
    tensors = list(_walk(value)) if lies_ready(value) else []
    # A gradient may be exchanged for another at any time.
    if any(type(t) is not torch.Tensor or t.requires_grad or t.grad is not None for t in tensors):
        return []
    return tensors


def _walk(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _walk(part)


def _where(value: Any) -> bytes:
    """A pickle of a value: of what is large in it, where it lies."""
    pickled, buffers, _ = pickle_with(TensorPickler, value)
    return pickle.dumps((pickled, [_piece(b) for b in buffers]), 5)


def _piece(buffer: memoryview) -> RemoteBuffer | bytes:
    small = buffer.nbytes < thresholds.LEASE_BUFFER_MIN
    return bytes(buffer) if small else RemoteBuffer.of(buffer)


def take(place: Place, keys: Collection[Any]) -> dict[Any, Any]:
    """Those of the results with these keys that lie on a shelf of another process.

    Raises
    ------
    OSError
        The process is gone, or may not be read.
    """
    table = bytearray(_TABLE)
    process_memory.read(place.pid, [(place.address, memoryview(table))])
    records = {digest: record for digest, *record in _RECORD.iter_unpack(table)}
    found = {}
    for key in keys:
        record = records.get(place.digest(key))
        if record is not None:
            try:
                found[key] = _take(place.pid, *record)
            except OSError:  # it went before it was read
                logger.debug("%r was on the shelf of process %d", key, place.pid, exc_info=True)
    return found


def _take(pid: int, content: bytes, address: int, nbytes: int) -> Any:
    token = ValidityToken(pid, address, content)
    # A record may be half written: what is unpickled lay behind a valid token.
    [item] = read_leased(token, [RemoteBuffer(address + TOKEN_BYTES, nbytes)])
    pickled, pieces = pickle.loads(item)
    return receive(pickled, pieces, token, None)


def look(lender: Lender, worker: str, keys: Collection[Any]) -> dict[Any, Any]:
    """What a worker finds of these keys on another's shelf, if it knows where that is."""
    place = lender.shelves.get(worker)
    if place is None:
        return {}
    try:
        return take(Place(*place), keys)
    except OSError:
        lender.shelves.pop(worker, None)
        return {}


def _gather(stock: Any) -> Any:
    """Dask's function that asks a worker for results: what lies on its shelf is not asked for."""

    @functools.wraps(stock)
    async def gather(rpc: Any, keys: Any, worker: str, *, who: Any = None, **options: Any) -> Any:
        lender = message_leases.lender_at(who)
        found = {} if lender is None else look(lender, worker, keys)
        rest = [key for key in keys if key not in found]
        if found and not rest:
            return {"status": "OK", "data": found}
        response = await stock(rpc, rest or keys, worker, who=who, **options)
        if response.get("status") == "OK":
            response["data"].update(found)
        return response

    return gather


def shelf_of(worker: Worker) -> Shelf | None:
    """This worker's, if it shows its results."""
    return _shelves.get(worker)


def apply(worker: Worker) -> None:
    """Have a worker that lends show its results, and look on others' shelves."""
    lender = message_leases.lender_at(worker.address)
    if worker in _shelves or lender is None or not internals.wrap_gathering(_gather):
        return
    shelf = _shelves[worker] = Shelf(worker, lender.readers)
    lender.shelf = shelf.place


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    shelf = _shelves.pop(worker, None)
    if shelf is not None:
        shelf.close()
        if not _shelves:
            internals.unwrap_gathering()
