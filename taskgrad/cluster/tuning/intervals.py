"""Driver, scheduler, worker: shorter batching intervals on the streams between them.

Dask's streams batch messages for some milliseconds: 10 from a client, 5 to a worker, 2 otherwise. A
chain of dependent tasks pays about 6 ms for this at every hop, whose work takes less than 2.

Each function runs where its streams are. It may be called again, with the same or another interval,
and then covers new streams too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distributed import Client, Scheduler, Worker

from taskgrad.cluster import internals


def apply_scheduler(scheduler: Scheduler, interval: float | None) -> None:
    """Set the intervals of the scheduler's streams; None restores them.

    Its plugins are told of a worker after its stream was made, but of a client before: for a new
    client call this in the event loop's next turn.
    """
    _apply(internals.scheduler_streams(scheduler), interval)


def apply_worker(worker: Worker, interval: float | None) -> None:
    """Set the interval of a worker's stream to the scheduler; None restores it."""
    _apply(internals.worker_streams(worker), interval)


def apply_client(client: Client, interval: float | None) -> None:
    """Set the interval of a client's stream to the scheduler; None restores it."""
    _apply(internals.client_streams(client), interval)


def _apply(streams: Iterable[Any], interval: float | None) -> None:
    for stream in streams:
        if interval is None:
            internals.restore_interval(stream)
        else:
            internals.set_interval(stream, interval)
