"""How many items to a chunk: few while nothing is known of them, then by their measured time.

A chunk costs a few milliseconds beside its items, so it shall take many times that. In a long map
chunks become longer: nobody waits at its end for more than a small part of the time that it took.
At the end of an input whose length is known they become smaller, so that the workers end together:
guided self-scheduling (Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

import math

SECONDS = 0.3
"""What a chunk shall take at first."""
MOST_SECONDS = 0.5
"""What it shall take at most, in a long map."""
_SHARE = 1 / 16
"""What part of the time of the map so far."""
LEAST_SECONDS = 0.01
"""What the smaller ones at the end shall take at least."""
NBYTES = 4 << 20
"""Bytes of items, or of results, from which on a chunk is not made larger."""
_GROWTH = 8
_WEIGHT = 0.5  # of the newest measurement


class Sizing:
    """The next chunk's size, from what earlier ones took.

    Parameters
    ----------
    chunksize
        The size, if it is not ours to choose.
    threads
        How many chunks run at a time.

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
        """A size, for an input that has so many items left, if that is known."""
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
        """A chunk of so many items took so long, and so many bytes one way or the other."""
        if not items:
            return
        self._largest = max(self._largest, items)
        self._total += seconds
        each = seconds / items
        before = self._seconds
        self._seconds = each if before is None else before + _WEIGHT * (each - before)
        self._nbytes = max(nbytes / items, self._nbytes * (1 - _WEIGHT))
