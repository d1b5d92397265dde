"""The batches of a stream that are in flight: how much may be, and whose results come next."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from distributed import Future

from taskgrad.cluster.changes import Changes
from taskgrad.cluster.wire.leases import BufferLease
from taskgrad.streaming.batch_codec import Batch, BatchEncoder
from taskgrad.streaming.chunk_size import NBYTES, Sizing
from taskgrad.streaming.serving import Failure

EMPTY = BatchEncoder().batch()
"""A batch without items."""
_RUNNING = 3
"""Batches sent and not answered, for each thread: one runs, one waits there, one is on its way."""
_HELD = 8
"""Batches sent and not yielded, for each thread."""


@dataclass
class InFlight:
    """A batch that was sent, and what came back."""

    number: int
    first: int
    count: int
    items: Batch
    nbytes: int
    lease: BufferLease | None = None
    attempts: int = 0
    scattered: Future | None = None
    future: Future | None = None
    results: Batch | None = None
    failure: Failure | None = None
    ran_on: str = ""
    answered: bool = False

    def label(self, title: str) -> str:
        """The batch, for a message."""
        return f"items {self.first} to {self.first + self.count - 1} of the map of {title!r}"

    def release(self, *, items: bool = False) -> None:
        """Release its task and the lease of its items; if asked so, the items too."""
        if self.lease is not None:
            self.lease.end()
        for future in (self.future, self.scattered):
            if future is not None:
                future.release()
        self.lease = self.future = self.scattered = None
        if items:
            self.items = EMPTY


class Window:
    """The batches between the input and the consumer, bounded.

    Three threads use it, and hold `lock` meanwhile: the feeder adds batches while there is room,
    the consumer takes them out, and answers arrive in the client's event loop. Who has changed
    something says so; `wait_for_change` waits for that.

    `threads` batches run at a time; `length` is the number of items, if that is known. The rest is
    as in `taskgrad.imap`; sizes that are None are chosen here.
    """

    def __init__(
        self,
        *,
        threads: int,
        chunksize: int | None,
        buffersize: int | None,
        length: int | None,
        unordered: bool,
    ) -> None:
        self.lock = threading.RLock()
        self.version = 0
        """How often something has changed."""
        self._changes = Changes()
        self.stopped = False
        self.pulled = 0
        """Items that were taken from the input."""
        self.yielded = 0
        self.resend: deque[InFlight] = deque()
        """Batches that have to be sent once more."""
        self.sizing = Sizing(chunksize, threads)
        self.batches: dict[int, InFlight] = {}
        """Those that were sent and not yielded, by number."""
        self._answered: deque[int] = deque()
        self._next = 0
        self._length = length
        self._unordered = unordered
        self._buffersize = buffersize
        if chunksize is None and buffersize is not None:
            self._most = max(1, buffersize // (2 * threads))
        else:
            self._most = buffersize or 1 << 62

    def wait_for_room(self) -> int:
        """Wait until items may be pulled; returns how many, or 0 once the stream has stopped."""
        while True:
            with self.lock:
                if self.stopped:
                    return 0
                size = self._room()
                if size:
                    return size
                seen = self.version
            self.wait_for_change(seen)

    def notify(self) -> None:
        """Something has changed; whoever waits is to look again."""
        self.version += 1
        self._changes.notify_all()

    def wait_for_change(self, seen: int, seconds: float | None = None) -> bool:
        """Wait until something has changed since this version; False if not within that time."""
        return self._changes.wait_for(lambda: self.version != seen, seconds)

    def _room(self) -> int:
        batches, threads = self.batches.values(), self.sizing.threads
        if len(self.unanswered()) >= _RUNNING * threads or len(batches) >= _HELD * threads:
            return 0
        nbytes = sum(b.nbytes for b in batches)
        if len(batches) >= threads and nbytes >= _HELD * threads * NBYTES:
            return 0
        left = None if self._length is None else max(1, self._length - self.pulled)
        size = min(self.sizing.next(left), self._most)
        if self._buffersize is not None:
            size = min(size, self._buffersize - (self.pulled - self.yielded))
        return max(0, size)

    def set_threads(self, threads: int) -> None:
        """Set how many batches run at a time."""
        with self.lock:
            self.sizing.threads = threads
            self.notify()

    def unanswered(self) -> list[InFlight]:
        """The batches whose results are not here."""
        return [b for b in self.batches.values() if not b.answered]

    def answered(self, batch: InFlight) -> None:
        """A batch has run."""
        batch.answered = True
        self._answered.append(batch.number)
        self.notify()

    def send_again(self, batch: InFlight, *, answered: bool) -> None:
        """Note that a batch has to run again; `answered` if `next` returned it."""
        batch.release()
        batch.answered = False
        if answered and not self._unordered:
            self._next = batch.number
        self.resend.append(batch)
        self.notify()

    def next(self) -> InFlight | None:
        """The batch whose results are to be yielded next, if it was answered."""
        if self._unordered:
            return self.batches[self._answered.popleft()] if self._answered else None
        batch = self.batches.get(self._next)
        if batch is None or not batch.answered:
            return None
        self._next += 1
        return batch

    def remove(self, batch: InFlight) -> None:
        """The results of a batch were yielded."""
        with self.lock:
            del self.batches[batch.number]
            self.notify()

    def stop(self) -> None:
        """Release all batches; nothing is sent any more."""
        with self.lock:
            self.stopped = True
            self.notify()
            batches = list(self.batches.values())
            self.batches.clear()
        for batch in batches:
            batch.release()
