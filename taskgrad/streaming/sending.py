"""A batch of a stream in flight: how its items are sent, as a Dask task, and what came back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from distributed import Client, Future

from taskgrad.cluster.config import deadline
from taskgrad.cluster.wire import process_memory
from taskgrad.cluster.wire.leases import BufferLease
from taskgrad.cluster.wire.thresholds import LEASE_MESSAGE_MIN, SCATTER_MIN
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.streaming.batch_codec import Batch, BatchEncoder
from taskgrad.streaming.serving import BatchTask, Failure, run_batch

EMPTY = BatchEncoder().batch()
"""A batch without items."""


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


class Sender:
    """Submits the batches of one stream; `lease` says whether workers may read large items here.

    By ``client.map`` and not as nodes through an executor: Dask places these tasks, runs those of a
    worker that died on another one, and takes large items as frames, which are not pickled.
    """

    def __init__(
        self, client: Client, name: str, token: str, star: bool, settings: TorchSettings
    ) -> None:
        self.lease = process_memory.available()
        self._client = client
        self._name = name
        self._token = token
        self._star = star
        self._settings = settings

    def submit(self, batch: InFlight) -> Future:
        """Send a batch, for the first time or again; its task's future is the caller's to hold."""
        items: Batch | Future = batch.items
        client = self._client
        batch.scattered = None
        if self.lease and batch.nbytes >= LEASE_MESSAGE_MIN:
            batch.lease = BufferLease()
            items = batch.items.leased(batch.lease)
        elif batch.nbytes >= SCATTER_MIN:
            with contextlib.suppress(OSError):  # the worker goes just now: then with the task
                items = batch.scattered = client.scatter(
                    batch.items, hash=False, timeout=deadline("answer"), asynchronous=False
                )
        task = BatchTask(
            self._token, client.id, batch.number, self._star, self.lease, self._settings
        )
        key = (self._name, batch.number, batch.attempts)
        batch.attempts += 1
        [future] = client.map(run_batch, [task], [items], key=[key], pure=False, fifo_timeout="0 s")
        return future
