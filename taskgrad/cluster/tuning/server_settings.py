"""Numbers of Dask's servers that are at least so large while taskgrad is used, then as before.

`PAUSE`: the part of its memory limit from which on Dask pauses a worker, so that results can be
spilled or sent away before it starts more. Parameters and optimizer state stay where they are:
nothing becomes free while the worker is paused, and the step that would free its gradients does not
run.

`PROFILE`: the seconds between two samples of Dask's profiler, which looks from the worker's event
loop at the stacks of running tasks, and takes Python's lock from them each time. A task that is all
Python gets up to a quarter more done without, and a worker of one core has that core taken from it
where the lock is free.

`TICK`: the seconds between two looks of an event loop at whether it is late. Each wakes a process,
of which a `LocalCluster` has one more than workers, and takes the lock, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from distributed.core import Server

from taskgrad.cluster import internals


class Minimum:
    """One such number: how to read it (None where it has no meaning), and how to write it."""

    def __init__(
        self, read: Callable[[Any], float | None], write: Callable[[Any, float], None]
    ) -> None:
        self._read = read
        self._write = write
        self._before: weakref.WeakKeyDictionary[Server, float] = weakref.WeakKeyDictionary()

    def hold(self, server: Server, least: float | None) -> None:
        """Make it at least so large on this server; None sets it back to what it was."""
        if least is None:
            before = self._before.pop(server, None)
            if before is not None:
                self._write(server, before)
            return
        current = self._before.get(server, self._read(server))
        if current is not None and current < least:
            self._before[server] = current
            self._write(server, least)


def _of_timer(name: str) -> Minimum:
    return Minimum(
        partial(internals.timer_interval, name=name),
        lambda server, seconds: internals.set_timer_interval(server, name, seconds),
    )


PAUSE = Minimum(internals.pause_fraction, internals.set_pause_fraction)
PROFILE = _of_timer("profile")
TICK = _of_timer("tick")
