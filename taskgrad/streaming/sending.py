"""A chunk of a stream on its way: how its items go out, as a Dask task, and what came back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from distributed import Client, Future

from taskgrad.cluster.config import deadline
from taskgrad.cluster.wire import process_memory
from taskgrad.cluster.wire.leases import BufferLease
from taskgrad.cluster.wire.thresholds import LEASE_MESSAGE_MIN, SCATTER_MIN
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.streaming.batch_codec import Packer, Parcel
from taskgrad.streaming.serving import Chunk, Failure, run_chunk

NOTHING = Packer().parcel()
"""No items."""


@dataclass
class Sent:
    """A chunk on its way, and what came back."""

    number: int
    first: int
    count: int
    items: Parcel
    nbytes: int
    lease: BufferLease | None = None
    attempts: int = 0
    scattered: Future | None = None
    future: Future | None = None
    results: Parcel | None = None
    failure: Failure | None = None
    worker: str = ""
    answered: bool = False

    @property
    def last(self) -> int:
        """The number of its last item."""
        return self.first + self.count - 1

    def let_go(self) -> None:
        """Nobody waits for its task any more, nor reads its items here."""
        if self.lease is not None:
            self.lease.end()
        for future in (self.future, self.scattered):
            if future is not None:
                future.release()
        self.lease = self.future = self.scattered = None


class Sender:
    """Submits the chunks of one map; `lend` says whether workers may read large items here."""

    def __init__(
        self, client: Client, name: str, token: str, star: bool, settings: TorchSettings
    ) -> None:
        self.lend = process_memory.available()
        self._client = client
        self._name = name
        self._token = token
        self._star = star
        self._settings = settings

    def submit(self, sent: Sent) -> Future:
        """Send a chunk, for the first time or again; its task's future is the caller's to hold."""
        items: Parcel | Future = sent.items
        client = self._client
        sent.scattered = None
        if self.lend and sent.nbytes >= LEASE_MESSAGE_MIN:
            sent.lease = BufferLease()
            items = sent.items.leased(sent.lease)
        elif sent.nbytes >= SCATTER_MIN:
            with contextlib.suppress(OSError):  # the worker goes just now: then with the task
                items = sent.scattered = client.scatter(
                    sent.items, hash=False, timeout=deadline("answer"), asynchronous=False
                )
        chunk = Chunk(self._token, client.id, sent.number, self._star, self.lend, self._settings)
        key = (self._name, sent.number, sent.attempts)
        sent.attempts += 1
        [future] = client.map(
            run_chunk, [chunk], [items], key=[key], pure=False, fifo_timeout="0 s"
        )
        return future
