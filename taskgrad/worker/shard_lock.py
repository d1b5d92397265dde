"""A task's exclusive use of a stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from taskgrad.worker.memory import gradient_bytes
from taskgrad.worker.store import ResidentStage

_at_stage: ContextVar[bool] = ContextVar("taskgrad_at_stage", default=False)


@contextmanager
def at_stage() -> Iterator[None]:
    """Mark this thread as one that holds a stage, or may wait for one."""
    token = _at_stage.set(True)
    try:
        yield
    finally:
        _at_stage.reset(token)


def is_at_stage() -> bool:
    """Whether this thread holds a stage, or may wait for one."""
    return _at_stage.get()


@contextmanager
def turn(stage: ResidentStage | None) -> Iterator[None]:
    """Hold the stage's lock, and add the time to its trainer's busy time, if there is one.

    At the end the bytes of its gradients are counted, if that was asked for while the lock was
    held. Without a stage the task runs a function, and there is nothing to wait for.
    """
    if stage is None:
        yield
        return
    with at_stage(), stage.lock:
        start = time.perf_counter()
        try:
            yield
        finally:
            if stage.training is not None:
                stage.training.busy += time.perf_counter() - start
            if stage.uncounted:
                stage.gradient_bytes = gradient_bytes(stage)
                stage.uncounted = False
