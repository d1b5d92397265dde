"""Large tensors between two worker processes of one host: lent, and read where they lie.

A worker that is asked for results sends the words of a message as ever; of large buffers it sends
only where they lie in its memory, and the receiver reads them there, with
`taskgrad.cluster.wire.process_memory`:

    lender                                      receiver
    a loan begins: a seal lies in memory
    lends buffers, sends their addresses ─────▶ reads the buffers, then the seal
                                                   intact: the buffers were there all the time
    the loan ends: the seal is broken,  ◀────── "OK"
    the buffers may go

The "OK" is Dask's own: the handler for results waits for it. If the connection breaks first, the
loan ends first, and a receiver that is still reading finds the seal broken. It raises an OSError,
which Dask takes for a lost connection, and asks again; the lender has seen the connection go too,
and lends it nothing the next time.

A worker lends only to those that have shown that they can read it. With the first tensors to a
worker that has an address on the same host goes an offer: where the seal of that message lies. Who
can read it there says so, and is told where it finds what need not be asked for: see
`taskgrad.cluster.wire.result_table`. All this is per pair of workers, and silent. What a driver
gives to workers is lent as well, and what it fetches from them: see `taskgrad.cluster.wire.scatter`
and `taskgrad.cluster.wire.gather`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from dask.sizeof import sizeof
from distributed import Worker
from distributed.comm.addressing import get_address_host

from taskgrad.cluster import internals
from taskgrad.cluster.wire import process_memory, thresholds
from taskgrad.cluster.wire.leases import BufferLease, RemoteBuffer, ValidityToken, read_leased
from taskgrad.cluster.wire.tensors import lies_ready

logger = logging.getLogger("taskgrad")

OFFERS = 3
"""How often in a row a worker is offered a loan, or one that it was given comes to nothing."""
_READER = "taskgrad_reader"
READS = "taskgrad_reads"
"""Asks a worker whether it can read a seal."""
LENDS = "taskgrad_lends"
"""Asks a worker to lend to this client, and where a seal lies by which that sees if it can read."""

_lenders: weakref.WeakKeyDictionary[Worker, Lender] = weakref.WeakKeyDictionary()
_handlers: weakref.WeakSet[Any] = weakref.WeakSet()
_current: ContextVar[Loan | None] = ContextVar("taskgrad_loan", default=None)
_lock = threading.Lock()
_borrowed = 0


class Offer(NamedTuple):
    """To the worker ``to``: tell ``lender`` if you can read the seal."""

    lender: str
    to: str


class Lender:
    """What a worker knows of those that might read its memory, by their addresses."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.readers: set[str] = set()
        self.clients: set[str] = set()
        """Drivers that it lends to."""
        self.offers: Counter[str] = Counter()
        self.shelf: Any = None
        """Where its readers find its results by themselves; see `wire.result_table`."""
        self.shelves: dict[str, Any] = {}
        """Where those are of others that it can read."""
        self.closed = False

    def loan(self, who: str | None) -> Loan | None:
        """One for a driver that it lends to, or for a worker that may be on this host."""
        if self.closed or who is None:
            return None
        if who in self.clients:
            return Loan(self, who)
        beside = "://" in who and get_address_host(who) == get_address_host(self.address)
        return Loan(self, who) if beside else None

    def knows(self, who: str) -> bool:
        """Whether this worker or driver has shown that it can read."""
        return who in self.readers or who in self.clients

    def offer(self, who: str) -> Offer | None:
        """One to this worker, unless it had some."""
        if self.offers[who] >= OFFERS:
            return None
        self.offers[who] += 1
        return Offer(self.address, who)


class Loan(BufferLease):
    """What is kept in memory for one receiver while one message is on its way."""

    def __init__(self, lender: Lender, to: str) -> None:
        super().__init__()
        self._lender = lender
        self._to = to
        self._offered = False
        self._room = thresholds.LEASE_MESSAGE_MAX

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether all of these values can be lent as they lie; what is sent may be compressed."""
        if not self._lender.knows(self._to) or not all(map(lies_ready, values)):
            return False
        return sum(map(sizeof, values)) <= thresholds.LEASE_MESSAGE_MAX

    def pack(self, pickled: bytes, buffers: list[memoryview]) -> tuple[bytes, list[memoryview]]:
        """A pickle and its buffers; what there is to lend of them is not among those that return.

        The new pickle calls `receive` with the old one. Any process that can import taskgrad reads
        it, as all that taskgrad sends.
        """
        known = self._lender.knows(self._to)
        offer = self._offer() if buffers and not known else None
        large = sum(b.nbytes for b in buffers if b.nbytes >= thresholds.LEASE_BUFFER_MIN)
        if offer is None and not (known and large >= thresholds.LEASE_MESSAGE_MIN):
            return pickled, buffers
        pieces = [self._lend(b) if known else pickle.PickleBuffer(b) for b in buffers]
        rest: list[pickle.PickleBuffer] = []
        received = _Received(pickle.PickleBuffer(pickled), pieces, self.token, offer)
        return pickle.dumps(received, 5, buffer_callback=rest.append), [b.raw() for b in rest]

    def _offer(self) -> Offer | None:
        """One goes with the first buffers of the message, if one is due."""
        offered, self._offered = self._offered, True
        return None if offered else self._lender.offer(self._to)

    def _lend(self, buffer: memoryview) -> RemoteBuffer | bytes | pickle.PickleBuffer:
        """What stands for a buffer; one that is not lent is sent, and an empty one is neither."""
        if not buffer.nbytes:
            return b""
        if not thresholds.LEASE_BUFFER_MIN <= buffer.nbytes <= self._room:
            return pickle.PickleBuffer(buffer)
        self._room -= buffer.nbytes
        return self.add(buffer)

    def answered(self, got: bool) -> None:
        """End it, and remember whether the receiver got what was lent."""
        if self._buffers and got:
            self._lender.offers.pop(self._to, None)
        elif self._buffers:
            self._lender.readers.discard(self._to)
            self._lender.clients.discard(self._to)
        self.end()


@contextlib.contextmanager
def lend(loan: Loan | None) -> Iterator[None]:
    """Lend what the messages of this block hold; the block ends when they have been answered."""
    answered = False
    _current.set(loan)  # also for the thread in which Dask serializes large messages
    try:
        yield
        answered = True
    finally:
        if loan is not None:
            loan.answered(answered)


class _Received:
    """Is pickled as a call of `receive`."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> Any:
        return receive, self._arguments


def current(context: dict[str, Any] | None) -> Loan | None:
    """The loan that goes with the message that is being serialized.

    Only messages to somebody have a context that names a recipient. While a worker looks for what
    it is asked for, it may also write other results to its disk, and those must be whole.
    """
    loan = _current.get()
    if loan is None or not loan.active or "recipient" not in (context or {}):
        return None
    return loan


def receive(pickled: Any, pieces: list[Any], seal: ValidityToken, offer: Offer | None) -> Any:
    """Unpickle a message of which some buffers were lent.

    Raises
    ------
    OSError
        They cannot be read, or might have changed while they were read.
    """
    if offer is not None:
        _consider(offer, seal)
    buffers = read_leased(seal, pieces)
    _count(sum(piece.nbytes for piece in pieces if isinstance(piece, RemoteBuffer)))
    return pickle.loads(pickled, buffers=buffers)


def lender_at(address: str | None) -> Lender | None:
    """What the worker of this process that has this address knows of others, if it lends."""
    return next((known for known in list(_lenders.values()) if known.address == address), None)


def bytes_borrowed() -> int:
    """How much this process has read out of the memory of others."""
    return _borrowed


def _count(nbytes: int) -> None:
    global _borrowed
    with _lock:  # messages are also read in a thread beside the event loop
        _borrowed += nbytes


def _reads(seal: Any) -> bool:
    """Whether this process can read a seal; who asks has no address of its own."""
    return ValidityToken(*seal).is_readable()


def _consider(offer: Offer, seal: ValidityToken) -> None:
    """If this process can read what is offered, have its worker say so."""
    worker = next((w for w in list(_lenders) if w.address == offer.to), None)
    if worker is not None and seal.is_readable():
        worker.loop.add_callback(_accept, worker, offer.lender)


async def _accept(worker: Worker, lender: str) -> None:
    try:
        shelf = await getattr(worker.rpc(lender), _READER)(address=worker.address)
        if shelf is not None and worker in _lenders:
            _lenders[worker].shelves[lender] = shelf
    except Exception:  # it is gone, or no longer lends: then nothing is lent
        logger.debug("%s accepts no loans from %s", worker.address, lender, exc_info=True)


def apply(worker: Worker) -> bool:
    """Have this worker lend memory, and borrow; returns whether it does."""
    if worker in _lenders:
        return True
    stock = internals.results_handler(worker) if process_memory.available() else None
    if stock is None:
        logger.debug("%s lends no memory: this system or this Dask cannot", worker.address)
        return False
    lender = _lenders[worker] = Lender(worker.address)

    def reader(address: str) -> Any:
        lender.readers.add(address)
        return lender.shelf

    probe = Loan(lender, "")

    def lends(client: str) -> Any:
        lender.clients.add(client)
        return tuple(probe.token)

    @functools.wraps(stock)
    async def get_data(comm: Any, keys: Any, who: str | None = None, **kwargs: Any) -> Any:
        loan = lender.loan(who)
        if loan is None:
            return await stock(comm, keys, who=who, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lend(loan))
            # What is lent as it lies is no work for a thread: to go there and back would take a
            # millisecond, where reading 32 MB takes two or three.
            if loan.holds(internals.held_in_memory(worker, keys)):
                stack.enter_context(internals.writing_at_once(comm))
            return await stock(comm, keys, who=who, **kwargs)

    _handlers.add(get_data)
    internals.set_results_handler(worker, get_data)
    worker.handlers[_READER] = reader
    worker.handlers[READS] = _reads
    worker.handlers[LENDS] = lends
    return True


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    lender = _lenders.pop(worker, None)
    if lender is None:
        return
    lender.closed = True
    for name in (_READER, READS, LENDS):
        worker.handlers.pop(name, None)
    handler = internals.results_handler(worker)
    if handler in _handlers:  # else somebody has put another over it
        internals.set_results_handler(worker, handler.__wrapped__)
