"""Worker: a table of its recent results in its memory, which others of the host read unasked.

To ask a worker for a result and be answered takes longer than to copy the result: two processes
wake up, twice each. So a worker that others can read publishes what it computed:

    table                               entry
    ┌────────┬───────┬─────────────┐    ┌───────┬──────────────────────────────────┐
    │ digest │ token │ address and │ ─▶ │ token │ pickle, with the addresses of    │
    │ of key │       │ size        │    │       │ large tensors in the same memory │
    └────────┴───────┴─────────────┘    └───────┴──────────────────────────────────┘

A reader looks up the key, reads the entry, then the tensors, each under the entry's token (see
`taskgrad.cluster.wire.leases`). The token becomes invalid before any of that memory is freed or
changed: when a tensor of the result dies, as its key was released or it was spilled to disk. A
reader that does not find a result, or finds it invalid, asks for it as always.

Only tensors that own no more than their memory and are sent without a copy are published, and lists
and tuples of them.
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
from taskgrad.cluster.wire import peers, process_memory, thresholds
from taskgrad.cluster.wire.leases import (
    TOKEN_BYTES,
    BufferLease,
    RemoteBuffer,
    ValidityToken,
    read_leased,
)
from taskgrad.cluster.wire.message_leases import unpack
from taskgrad.cluster.wire.peers import PeerRegistry
from taskgrad.cluster.wire.serialize import TensorPickler, pickle_with
from taskgrad.cluster.wire.tensors import is_ready_to_send

logger = logging.getLogger("taskgrad")

SLOTS = 64
"""Results in a table; a new one replaces the oldest. Each costs a few hundred bytes."""
# Event-loop turns before a result is published. The message that it is there goes out first; it is
# a millisecond until another worker is told to fetch it, and pickling an entry would delay that.
_TURNS = 4
_RECORD = struct.Struct("16s16sQQ")  # digest, token, address and bytes of the entry's pickle
_TABLE_BYTES = SLOTS * _RECORD.size

_tables: weakref.WeakKeyDictionary[Worker, ResultTable] = weakref.WeakKeyDictionary()


class TableLocation(NamedTuple):
    """The address of a table, and the salt of its digests."""

    pid: int
    address: int
    salt: bytes

    def digest(self, key: Any) -> bytes:
        """A hash of the key that occurs by chance in no other memory."""
        return hashlib.blake2b(repr(key).encode(), digest_size=16, key=self.salt).digest()


class _Entry:
    """A published result; becomes invalid when any of its tensors dies."""

    def __init__(self, slot: int, tensors: list[torch.Tensor], pickled: bytes) -> None:
        self.slot = slot
        self.lease = lease = BufferLease(pickled)
        self._watched = [weakref.ref(t, lambda _died: lease.end()) for t in tensors]


class ResultTable:
    """What one worker publishes, while there is another worker among its `readers`."""

    def __init__(self, worker: Worker, readers: Collection[str]) -> None:
        self._worker = weakref.proxy(worker)
        self._readers = readers
        self._table = ctypes.create_string_buffer(_TABLE_BYTES)
        self.location = TableLocation(
            os.getpid(), ctypes.addressof(self._table), os.urandom(TOKEN_BYTES)
        )
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._free = list(range(SLOTS))
        self._closed = False

    def publish(self, key: Any, value: Any) -> None:
        """Publish a result under its key if it qualifies: CPU tensors only, at most 64."""
        self.remove(key)
        tensors = _tensors_of(value)
        if (
            not 0 < len(tensors) <= thresholds.INSPECTED_VALUES_MAX
            or sum(t.nbytes for t in tensors) > thresholds.LEASE_MESSAGE_MAX
        ):
            return
        if not self._free:
            self.remove(next(iter(self._entries)))
        pickled = _pickle(value)
        entry = self._entries[key] = _Entry(self._free.pop(), tensors, pickled)
        token, digest = entry.lease.token, self.location.digest(key)
        self._write(entry.slot, digest, token.content, token.address, len(pickled))

    def task_moved(self, key: Any, start: str, finish: str) -> None:
        """Publish or remove the result of a task that went from one state to another."""
        if start == "memory":
            self.remove(key)
        elif finish == "memory" and start != "flight" and self._is_read():
            self._publish_later(key, _TURNS)

    def _is_read(self) -> bool:
        return any("://" in reader for reader in self._readers)  # drivers look nothing up

    def _publish_later(self, key: Any, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._publish_later, key, turns - 1)
        elif not self._closed:
            for value in internals.held_in_memory(self._worker, [key]):
                self.publish(key, value)

    def remove(self, key: Any) -> None:
        """Remove a result, if it is published."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.lease.end()
            self._write(entry.slot, b"", b"", 0, 0)
            self._free.append(entry.slot)

    def _write(self, slot: int, *record: Any) -> None:
        _RECORD.pack_into(self._table, slot * _RECORD.size, *record)

    def close(self) -> None:
        """Remove all results, and publish no more."""
        self._closed = True
        for key in list(self._entries):
            self.remove(key)


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a value that consists of such as can be published; else none."""
    tensors = list(_walk(value)) if is_ready_to_send(value) else []
    # A gradient may be replaced at any time.
    if any(type(t) is not torch.Tensor or t.requires_grad or t.grad is not None for t in tensors):
        return []
    return tensors


def _walk(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _walk(part)


def _pickle(value: Any) -> bytes:
    """A pickle with the addresses of large tensors, and copies of small ones."""
    pickled, buffers, _ = pickle_with(TensorPickler, value)
    parts = [
        bytes(b) if b.nbytes < thresholds.LEASE_BUFFER_MIN else RemoteBuffer.of(b) for b in buffers
    ]
    return pickle.dumps((pickled, parts), 5)


def lookup(location: TableLocation, keys: Collection[Any]) -> dict[Any, Any]:
    """Those of the results with these keys that are in another process's table.

    OSError if the process is gone, or may not be read.
    """
    table = bytearray(_TABLE_BYTES)
    process_memory.read(location.pid, [(location.address, memoryview(table))])
    records = {digest: record for digest, *record in _RECORD.iter_unpack(table)}
    found = {}
    for key in keys:
        record = records.get(location.digest(key))
        if record is not None:
            try:
                found[key] = _read(location.pid, *record)
            except OSError:  # it was removed before it was read
                logger.debug("%r was published by process %d", key, location.pid, exc_info=True)
    return found


def _read(pid: int, content: bytes, address: int, nbytes: int) -> Any:
    token = ValidityToken(pid, address, content)
    # A record may be half written; only what follows a valid token is unpickled.
    [entry] = read_leased(token, [RemoteBuffer(address + TOKEN_BYTES, nbytes)])
    pickled, parts = pickle.loads(entry)
    return unpack(pickled, parts, token)


def lookup_at(registry: PeerRegistry, worker: str, keys: Collection[Any]) -> dict[Any, Any]:
    """`lookup` in the table of another worker, if its location is known."""
    location = registry.tables.get(worker)
    if location is None:
        return {}
    try:
        return lookup(TableLocation(*location), keys)
    except OSError:
        registry.tables.pop(worker, None)
        return {}


def _wrap_gather(stock: Any) -> Any:
    """Wrap the function by which Dask's workers ask each other for results: look them up first."""

    @functools.wraps(stock)
    async def gather(rpc: Any, keys: Any, worker: str, *, who: Any = None, **options: Any) -> Any:
        registry = peers.registry_at(who)
        found = {} if registry is None else lookup_at(registry, worker, keys)
        rest = [key for key in keys if key not in found]
        if found and not rest:
            return {"status": "OK", "data": found}
        response = await stock(rpc, rest or keys, worker, who=who, **options)
        if response.get("status") == "OK":
            response["data"].update(found)
        return response

    return gather


def table_of(worker: Worker) -> ResultTable | None:
    """This worker's, if it publishes results."""
    return _tables.get(worker)


def apply(worker: Worker) -> None:
    """Have a worker that leases memory publish its results, and look up those of others."""
    registry = peers.registry_at(worker.address)
    if worker in _tables or registry is None or not internals.wrap_gathering(_wrap_gather):
        return
    table = _tables[worker] = ResultTable(worker, registry.readers)
    registry.table = table.location


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    table = _tables.pop(worker, None)
    if table is not None:
        table.close()
        if not _tables:
            internals.unwrap_gathering()
