"""Scheduler, worker: lower bounds on three Dask server settings, restored with the last client.

`PAUSE`: the fraction of its memory limit at which Dask pauses a worker, so that results can be
spilled or moved before more tasks start. Parameters and optimizer state stay where they are:
nothing becomes free while the worker is paused, and the step that would free its gradients does not
run.

`PROFILE`: the seconds between two samples of Dask's profiler, which reads the stacks of running
tasks from the worker's event loop and takes the GIL for each. Without it a task in pure Python is
up to a quarter faster, and a worker of one core keeps that core even where the GIL is free.

`TICK`: the seconds between an event loop's checks for delays. Each wakes a process, of which a
`LocalCluster` has one more than workers, and takes the GIL.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from distributed.core import Server

from taskgrad.cluster import internals


class LowerBound:
    """A lower bound on one setting: how to read it (None where it does not exist), and set it."""

    def __init__(
        self, read: Callable[[Any], float | None], write: Callable[[Any, float], None]
    ) -> None:
        self._read = read
        self._write = write
        self._before: weakref.WeakKeyDictionary[Server, float] = weakref.WeakKeyDictionary()

    def apply(self, server: Server, least: float | None) -> None:
        """Raise the setting to at least this value on a server; None restores it."""
        if least is None:
            before = self._before.pop(server, None)
            if before is not None:
                self._write(server, before)
            return
        current = self._before.get(server, self._read(server))
        if current is not None and current < least:
            self._before[server] = current
            self._write(server, least)


def _of_timer(name: str) -> LowerBound:
    return LowerBound(
        partial(internals.timer_interval, name=name),
        lambda server, seconds: internals.set_timer_interval(server, name, seconds),
    )


PAUSE = LowerBound(internals.pause_fraction, internals.set_pause_fraction)
PROFILE = _of_timer("profile")
TICK = _of_timer("tick")
