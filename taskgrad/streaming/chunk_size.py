"""The number of items in a batch: one at first, then from the measured time of an item.

A batch has an overhead of a few milliseconds, so it should run for many times that. Batches grow
with the time that the map has run, as waiting for the last one is then a small part of it. At the
end of an input of known length they shrink, so that the workers end together: guided
self-scheduling (Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

import math

SECONDS = 0.3
"""Target duration of a batch at first."""
MOST_SECONDS = 0.5
"""Longest target duration, in a long map."""
_SHARE = 1 / 16
"""Target duration as a part of the time that the map has run."""
LEAST_SECONDS = 0.01
"""Shortest target duration of the small batches at the end."""
NBYTES = 4 << 20
"""Bytes of items, or of results, that a batch should not exceed."""
_GROWTH = 8
_WEIGHT = 0.5  # of the newest measurement


class Sizing:
    """The next batch's size, from the duration of earlier ones.

    Parameters
    ----------
    chunksize
        A fixed size, or None to choose it.
    threads
        How many batches run at a time.

    Examples
    --------
    >>> sizing = Sizing(None, threads=2)
    >>> sizing.next(None)
    1
    >>> sizing.ran(items=1, seconds=0.005, nbytes=100)
    >>> sizing.next(None)
    8
    >>> sizing.next(remaining=10)
    3
    """

    def __init__(self, chunksize: int | None, threads: int) -> None:
        self._fixed = chunksize
        self.threads = threads
        self._largest = 0
        self._seconds: float | None = None
        self._total = 0.0
        self._nbytes = 0.0

    def next(self, remaining: int | None) -> int:
        """The size of the next batch; `remaining` items are left in the input, if that is known."""
        if self._fixed is not None:
            return self._fixed
        if self._seconds is None:
            return 1
        so_far = self._total / self.threads
        seconds = min(max(SECONDS, _SHARE * so_far), MOST_SECONDS)
        most = min(self._of(seconds), _GROWTH * self._largest)
        if self._nbytes:
            most = min(most, NBYTES / self._nbytes)
        if remaining is not None:
            share = math.ceil(remaining / (2 * self.threads))
            most = min(most, max(share, self._of(LEAST_SECONDS)))
        return max(1, int(most))

    def _of(self, seconds: float) -> float:
        assert self._seconds is not None
        return seconds / max(self._seconds, 1e-9)

    def ran(self, items: int, seconds: float, nbytes: int) -> None:
        """A batch has run; `nbytes` is the size of its items or its results, the larger."""
        if not items:
            return
        self._largest = max(self._largest, items)
        self._total += seconds
        each = seconds / items
        before = self._seconds
        self._seconds = each if before is None else before + _WEIGHT * (each - before)
        self._nbytes = max(nbytes / items, self._nbytes * (1 - _WEIGHT))
