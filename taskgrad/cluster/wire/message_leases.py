"""Driver, worker: messages whose large buffers are not sent but read in the sender's memory.

The sender replaces each large buffer of a pickle by its address
(`taskgrad.cluster.wire.leases`), and keeps it until the message is answered:

    sender                                        receiver
    MessageLease.pack: addresses and a token ───▶ unpack: reads the buffers, then the token
    the lease ends                           ◀─── Dask's own "OK"

If the connection breaks first, the lease ends first, and a receiver that is still reading finds the
token invalid. Its OSError is for Dask a lost connection: it asks again, and this time the sender,
which has seen the connection break too, sends the buffers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from dask.sizeof import sizeof
from distributed import Worker

from taskgrad.cluster import internals
from taskgrad.cluster.wire import peers, process_memory, thresholds
from taskgrad.cluster.wire.leases import BufferLease, RemoteBuffer, ValidityToken, read_leased
from taskgrad.cluster.wire.peers import PeerSet
from taskgrad.cluster.wire.tensors import is_ready_to_send

logger = logging.getLogger("taskgrad")

_handlers: weakref.WeakSet[Any] = weakref.WeakSet()
_current: ContextVar[MessageLease | None] = ContextVar("taskgrad_lease", default=None)
_lock = threading.Lock()
_bytes_read = 0


class MessageLease(BufferLease):
    """The buffers of one message, leased to its receiver."""

    def __init__(self, readers: PeerSet, to: str) -> None:
        super().__init__()
        self._readers = readers
        self._to = to
        self._room = thresholds.LEASE_MESSAGE_MAX

    def pack(self, pickled: bytes, buffers: list[memoryview]) -> tuple[bytes, list[memoryview]]:
        """Replace leasable buffers by their addresses: the new pickle, and those still to be sent.

        The new pickle calls `unpack` with the old one. Any process that can import taskgrad reads
        it, as all that taskgrad sends.
        """
        large = sum(b.nbytes for b in buffers if b.nbytes >= thresholds.LEASE_BUFFER_MIN)
        if large < thresholds.LEASE_MESSAGE_MIN:
            return pickled, buffers
        rest: list[pickle.PickleBuffer] = []
        parts = [self._part(b) for b in buffers]
        packed = PickledCall(unpack, pickle.PickleBuffer(pickled), parts, self.token)
        return pickle.dumps(packed, 5, buffer_callback=rest.append), [b.raw() for b in rest]

    def _part(self, buffer: memoryview) -> RemoteBuffer | bytes | pickle.PickleBuffer:
        if not buffer.nbytes:
            return b""
        if not thresholds.LEASE_BUFFER_MIN <= buffer.nbytes <= self._room:
            return pickle.PickleBuffer(buffer)
        self._room -= buffer.nbytes
        return self.add(buffer)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Lease what the messages of this block hold; it ends when they have been answered."""
        answered = False
        _current.set(self)  # also for the thread in which Dask serializes large messages
        try:
            yield
            answered = True
        finally:
            self.finish(answered)

    def finish(self, answered: bool) -> None:
        """End the lease; record whether the receiver has read what was leased."""
        if self._buffers:
            self._readers.used(self._to, answered)
        self.end()


class PickledCall:
    """Is pickled as a call: ``function(*arguments)`` arrives in its place."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def current(context: dict[str, Any] | None) -> MessageLease | None:
    """The lease of the message that is being serialized.

    Only messages have a context with a recipient. Results that a worker meanwhile spills to its
    disk have none, and must be whole.
    """
    lease = _current.get()
    if lease is None or not lease.active or "recipient" not in (context or {}):
        return None
    return lease


def unpack(pickled: Any, parts: list[Any], token: ValidityToken) -> Any:
    """Unpickle a value after reading its leased buffers.

    OSError if they cannot be read, or might have changed while they were read.
    """
    buffers = read_leased(token, parts)
    _count(sum(part.nbytes for part in parts if isinstance(part, RemoteBuffer)))
    return pickle.loads(pickled, buffers=buffers)


def bytes_read() -> int:
    """Bytes that this process has read from the memory of others."""
    return _bytes_read


def _count(nbytes: int) -> None:
    global _bytes_read
    with _lock:  # large messages are deserialized in a thread
        _bytes_read += nbytes


def _lease_whole(values: Sequence[Any]) -> bool:
    """True if all of these values can be leased without a copy."""
    if not all(map(is_ready_to_send, values)):
        return False
    return sum(map(sizeof, values)) <= thresholds.LEASE_MESSAGE_MAX


def apply(worker: Worker) -> bool:
    """Have this worker lease the results that it is asked for; returns whether it does."""
    if peers.registry_at(worker.address) is not None:
        return True
    stock = internals.results_handler(worker) if process_memory.available() else None
    if stock is None:
        logger.debug("%s leases no memory: this system or this Dask cannot", worker.address)
        return False
    registry = peers.register(worker)

    @functools.wraps(stock)
    async def get_data(comm: Any, keys: Any, who: Any = None, **kwargs: Any) -> Any:
        if who not in registry.readers:
            if registry.is_due(who):
                worker.loop.add_callback(peers.probe, worker, who)
            return await stock(comm, keys, who=who, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(MessageLease(registry.readers, who).attached())
            # Serializing in a thread costs a millisecond, and pays only where bytes are copied;
            # reading 32 MB takes two or three.
            values = internals.held_in_memory(worker, keys)
            if _lease_whole(values):
                stack.enter_context(internals.writing_at_once(comm))
            return await stock(comm, keys, who=who, **kwargs)

    _handlers.add(get_data)
    internals.set_results_handler(worker, get_data)
    return True


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    if peers.unregister(worker):
        handler = internals.results_handler(worker)
        if handler in _handlers:  # else it was replaced since
            internals.set_results_handler(worker, handler.__wrapped__)
