"""A task's exclusive use of a shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from taskgrad.worker.memory import gradient_bytes
from taskgrad.worker.shard import ResidentShard

_using_shard: ContextVar[bool] = ContextVar("taskgrad_at_shard", default=False)


@contextmanager
def using_shard() -> Iterator[None]:
    """Mark this thread as one that holds a shard's lock, or may wait for one."""
    token = _using_shard.set(True)
    try:
        yield
    finally:
        _using_shard.reset(token)


def is_using_shard() -> bool:
    """True if this thread holds a shard's lock, or may wait for one."""
    return _using_shard.get()


def exclusive(shard: ResidentShard | None) -> AbstractContextManager[None]:
    """Hold the shard's lock, and add the elapsed time to its trainer's busy time, if it has one.

    At the end the bytes of its gradients are counted, if that was asked for while the lock was
    held. Without a shard the task runs a function, and there is nothing to wait for.
    """
    return _NOTHING if shard is None else _Exclusive(shard)


_NOTHING = nullcontext()


class _Exclusive(AbstractContextManager[None]):
    __slots__ = ("_shard", "_start", "_token")

    def __init__(self, shard: ResidentShard) -> None:
        self._shard = shard

    def __enter__(self) -> None:
        self._token = _using_shard.set(True)
        try:
            self._shard.lock.acquire()
        except BaseException:
            _using_shard.reset(self._token)
            raise
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        shard = self._shard
        try:
            if shard.training is not None:
                shard.training.busy += time.perf_counter() - self._start
            for part in (shard, *shard.parts):
                if part.uncounted:
                    part.gradient_bytes = gradient_bytes(part)
                    part.uncounted = False
        finally:
            shard.lock.release()
            _using_shard.reset(self._token)
