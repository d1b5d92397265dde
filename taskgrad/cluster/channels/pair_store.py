"""Worker: a torch store that two workers share over their connection: no port is opened for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

_WAIT_S = 60.0


class PairStore(Store):
    """What either of two workers sets, both can get.

    Parameters
    ----------
    tell
        Called with each (key, value) that is set here; the other end's `put` is to get it.
    """

    def __init__(self, tell: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._tell = tell
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, key: str, value: bytes) -> None:
        """The other end has set a value."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """The other end is gone: `get` and `wait` raise ConnectionError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # torch calls these, from C++ too.

    def set(self, key: str, value: Any) -> None:
        """Set a value at both ends."""
        self.put(key, value)
        self._tell(key, value)

    def get(self, key: str) -> bytes:
        """The value; waits until either end has set it."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all have been set."""
        seconds = _WAIT_S if timeout is None else timeout.total_seconds()
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._closed or all(key in self._values for key in keys), seconds
            )
        if self._closed:
            raise ConnectionError("the other worker is gone")
        if not there:
            raise TimeoutError(f"the other worker has not set {keys} within {seconds} s")

    def check(self, keys: Sequence[str]) -> bool:
        """True if all have been set."""
        return all(key in self._values for key in keys)
