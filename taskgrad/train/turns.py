"""Calls of one trainer from several threads take turns; callbacks come after each."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Lets one thread at a time in, and tells of what happened there when it is out.

    So what is told may call the trainer itself, or wait for a thread that does.

    Parameters
    ----------
    tell
        Called for each item that was given to `later`, in order and by one thread at a time.
    """

    def __init__(self, tell: Callable[[T], None]) -> None:
        self._tell = tell
        self._lock = threading.RLock()
        self._depth = 0
        self._telling = threading.Lock()
        self._waiting: deque[T] = deque()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Have the trainer for oneself; within another turn of the same thread, go on in that."""
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
                self._tell_all()

    def later(self, item: T) -> None:
        """Tell of this after the turn."""
        self._waiting.append(item)

    def _tell_all(self) -> None:
        # Another thread that tells, or whoever is told and comes here, leaves it to the first.
        while self._waiting and self._telling.acquire(blocking=False):
            try:
                self._tell(self._waiting.popleft())
            finally:
                self._telling.release()
