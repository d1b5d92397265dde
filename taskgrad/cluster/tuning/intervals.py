"""Driver, scheduler, worker: shorter batching intervals on the streams between them.

Dask's streams batch messages for some milliseconds: 10 from a client, 5 to a worker, 2 otherwise. A
chain of dependent tasks pays about 6 ms for this at every hop, whose work takes less than 2.
"""

from __future__ import annotations

from distributed import Client, Scheduler, Worker

from taskgrad.cluster import internals


def apply(server: Scheduler | Worker | Client, interval: float | None) -> None:
    """Set the interval of all streams on which this one sends now; None restores them.

    A scheduler's plugins are told of a worker after its stream was made, but of a client before:
    for a new client call this in the event loop's next turn.
    """
    for stream in internals.streams(server):
        if interval is None:
            internals.restore_interval(stream)
        else:
            internals.set_interval(stream, interval)
