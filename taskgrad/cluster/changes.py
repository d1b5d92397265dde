"""Wait for what another thread does, in a thread that Ctrl-C may interrupt anywhere.

An interrupt within ``threading.Condition``, which is Python code, can leave it locked for good, and
with it the event loop that is to notify it. Locks are C code: they are held or they are not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable


class Changes:
    """Tells threads that wait until something is true when to look again."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()  # each held until the next notification

    def notify_all(self) -> None:
        """Have the threads that wait look again; any thread may call, after the change."""
        for _ in range(len(self._waiting)):
            try:
                self._waiting.popleft().release()
            except IndexError:  # another thread notifies, too
                return

    def wait_for(self, is_true: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until this is true; False if it is not after so long."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            held = threading.Lock()
            held.acquire()
            self._waiting.append(held)  # before the look: no change after it is missed
            try:
                if is_true():
                    return True
                left = -1.0 if end is None else max(0.0, end - time.monotonic())
                if not held.acquire(timeout=left):
                    return is_true()
            finally:
                with contextlib.suppress(ValueError):  # it was notified
                    self._waiting.remove(held)
