"""A lock for the calls of one trainer from several threads, with callbacks after each call."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class CallLock(Generic[T]):
    """A reentrant lock that runs callbacks after its release.

    As the lock is free then, a callback may call the trainer, or wait for a thread that does. It is
    called for each item that was passed to `notify_later`, in order and by one thread at a time.
    """

    def __init__(self, callback: Callable[[T], None]) -> None:
        self._callback = callback
        self._lock = threading.RLock()
        self._depth = 0
        self._notifying = threading.Lock()
        self._pending: deque[T] = deque()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in the block; the thread that holds it may take it again."""
        outermost = False
        try:
            with self._lock:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                    outermost = self._depth == 0
        finally:
            if outermost:
                self._notify_all()

    def notify_later(self, item: T) -> None:
        """Call the callback with this item once the lock is released."""
        self._pending.append(item)

    def _notify_all(self) -> None:
        # If another thread, or a callback below in this one, is notifying, it does the rest.
        while self._pending and self._notifying.acquire(blocking=False):
            try:
                self._callback(self._pending.popleft())
            finally:
                self._notifying.release()
