"""A lock for the calls of one trainer from several threads, with callbacks after each call."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from taskgrad.cluster.changes import Changes

T = TypeVar("T")


class CallLock(Generic[T]):
    """A reentrant lock that runs callbacks after its release.

    As the lock is free then, a callback may call the trainer, or wait for a thread that does. It is
    called for each item that was passed to `notify_later`, in order, by one thread at a time and
    never from within itself.
    """

    def __init__(self, callback: Callable[[T], None]) -> None:
        self._callback = callback
        self._lock = threading.RLock()
        self._depth = 0
        self._guard = threading.Lock()  # held to read or change what follows
        self._changed = Changes()
        self._pending: deque[T] = deque()
        self._notified: tuple[int, T] | None = None  # who runs the callback, for which item

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
        with self._guard:
            self._pending.append(item)

    @property
    def notified(self) -> T | None:
        """In the callback, the item that it was called for; None elsewhere."""
        now = self._notified
        return now[1] if now is not None and now[0] == threading.get_ident() else None

    def wait_for(self, concerns: Callable[[T], bool]) -> None:
        """Wait until no other thread is to run the callback for an item that this is true of.

        Returns at once in the callback itself. Not to be called while the lock is held. As with any
        lock, how long it takes is up to the thread that it waits for: that runs the user's code.
        """
        self._changed.wait_for(lambda: not self.is_elsewhere(concerns))

    def is_elsewhere(self, concerns: Callable[[T], bool]) -> bool:
        """True if another thread is to run the callback for an item that this is true of."""
        with self._guard:
            now, pending = self._notified, list(self._pending)
        if now is not None and now[0] == threading.get_ident():
            return False
        return any(map(concerns, [*pending, *([] if now is None else [now[1]])]))

    def _notify_all(self) -> None:
        # If another thread, or a callback below in this one, is notifying, it does the rest.
        while True:
            notifies = False
            try:
                with self._guard:
                    if self._notified is not None or not self._pending:
                        return
                    notifies = True
                    item = self._pending.popleft()
                    self._notified = threading.get_ident(), item
                self._callback(item)
            finally:
                if notifies:
                    self._notified = None
                    self._changed.notify_all()
