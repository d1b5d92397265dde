"""A worker looks less often at what its tasks are doing.

Dask's profiler samples the stacks of running tasks, by default every 10 ms, in the worker's event
loop: each sample takes Python's lock from the task. A task that is all Python gets a quarter more
done without, and a worker of one core has that core taken from it where the lock is free.
"""

from __future__ import annotations

import weakref

from distributed import Worker

from taskgrad.cluster import internals

_before: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()


def apply(worker: Worker, interval: float) -> None:
    """Have this worker sample no more often than every so many seconds."""
    current = _before.get(worker, internals.profile_interval(worker))
    if current is None or current >= interval:
        return
    _before[worker] = current
    internals.set_profile_interval(worker, interval)


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    before = _before.pop(worker, None)
    if before is not None:
        internals.set_profile_interval(worker, before)
