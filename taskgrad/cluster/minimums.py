"""Numbers of a worker that are at least so large while taskgrad is used, and then as before.

`PAUSE`: the part of its memory limit from which on Dask pauses a worker, so that results can be
spilled or sent away before it starts more. Parameters and optimizer state stay where they are:
nothing becomes free while the worker is paused, and the step that would free its gradients does not
run.

`PROFILE`: the seconds between two samples of Dask's profiler, which looks from the worker's event
loop at the stacks of running tasks, and takes Python's lock from them each time. A task that is all
Python gets up to a quarter more done without, and a worker of one core has that core taken from it
where the lock is free.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from distributed import Worker

from taskgrad.cluster import internals


class Minimum:
    """One such number: how to read it (None where it has no meaning), and how to write it."""

    def __init__(
        self, read: Callable[[Worker], float | None], write: Callable[[Worker, float], None]
    ) -> None:
        self._read = read
        self._write = write
        self._before: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()

    def hold(self, worker: Worker, least: float | None) -> None:
        """Make it at least so large on this worker; None sets it back to what it was."""
        if least is None:
            before = self._before.pop(worker, None)
            if before is not None:
                self._write(worker, before)
            return
        current = self._before.get(worker, self._read(worker))
        if current is not None and current < least:
            self._before[worker] = current
            self._write(worker, least)


PAUSE = Minimum(internals.pause_fraction, internals.set_pause_fraction)
PROFILE = Minimum(internals.profile_interval, internals.set_profile_interval)
