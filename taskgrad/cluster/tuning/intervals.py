"""Short intervals on the streams between clients, scheduler and workers.

Every message of Dask's goes through a stream that collects for some milliseconds before it sends:
10 from a client, 5 to a worker, 2 on the other ways. A chain of tasks that wait for each other pays
this at every hop, about 6 ms, where the work of a hop takes less than 2.

Each function is called where its streams are: in the scheduler, in a worker, in a client. Each may
be called again, with the same or another interval: streams that are new since get it then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distributed import Client, Scheduler, Worker

from taskgrad.cluster import internals


def apply_scheduler(scheduler: Scheduler, interval: float | None) -> None:
    """Set what the scheduler sends; None restores it.

    Its plugins hear of a worker after the stream to it was made, of a client before: for a new
    client call this from the event loop's next turn.
    """
    _apply(internals.scheduler_streams(scheduler), interval)


def apply_worker(worker: Worker, interval: float | None) -> None:
    """Set what a worker sends to the scheduler; None restores it."""
    _apply(internals.worker_streams(worker), interval)


def apply_client(client: Client, interval: float | None) -> None:
    """Set what a client sends; None restores it."""
    _apply(internals.client_streams(client), interval)


def _apply(streams: Iterable[Any], interval: float | None) -> None:
    for stream in streams:
        if interval is None:
            internals.restore_interval(stream)
        else:
            internals.set_interval(stream, interval)
