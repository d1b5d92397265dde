"""A worker that is nearly full of parameters goes on.

Dask pauses a worker at 80 % of its memory limit, so that results can be spilled or sent away before
it starts more. Parameters and optimizer state stay where they are: nothing becomes free while the
worker is paused, and the step that would free its gradients does not run.
"""

from __future__ import annotations

import weakref

from distributed import Worker

from taskgrad.cluster import internals

_before: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()


def apply(worker: Worker, fraction: float) -> None:
    """Have Dask pause this worker only from this part of its memory limit on.

    Where it pauses later already, or not at all, that stays.
    """
    current = _before.get(worker, internals.pause_fraction(worker))
    if current is None or current >= fraction:
        return
    _before[worker] = current
    internals.set_pause_fraction(worker, fraction)


def restore(worker: Worker) -> None:
    """Undo `apply`."""
    before = _before.pop(worker, None)
    if before is not None:
        internals.set_pause_fraction(worker, before)
