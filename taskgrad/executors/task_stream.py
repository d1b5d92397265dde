"""Driver: what programs did, as rows of the dashboard's task stream."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from distributed import Client

from taskgrad.cluster import internals
from taskgrad.cluster.scheduler_plugin import RAN

# How often the scheduler is told.
_SHOW_S = 0.5

Row = tuple[str, str, float, float]
"""(name, "run", "send" or "receive", start, stop); times are in seconds since the epoch."""
_ACTIONS = {"run": "compute", "send": "transfer", "receive": "transfer"}
"""What the dashboard's task stream calls them."""


class TaskStream:
    """Rows of these workers. Any thread may call; it holds the connections' lock."""

    def __init__(self, client: Client, workers: Sequence[str]) -> None:
        self._client = client
        self._workers = workers
        self._labels: dict[int, list[list[tuple[str, str]]]] = {}  # by program, by rank
        self._unshown: list[list[Row]] = [[] for _ in workers]  # what each did since `_shown_at`
        self._shown_at = time.monotonic()

    def label(self, program: int, labels: list[list[tuple[str, str]]]) -> None:
        """From now on rows of this program have these names, for each rank."""
        self._labels[program] = labels

    def unlabel(self, program: int) -> None:
        """No more rows of this program come."""
        self._labels.pop(program, None)

    def add(self, rank: int, program: int, timings: bytes) -> list[Row]:
        """The rows of a step, which a worker has timed as `Resident` does."""
        labels = self._labels[program][rank]
        timed = array("d", timings)
        numbers, times = map(int, timed[::3]), zip(timed[1::3], timed[2::3], strict=True)
        rows = [(*labels[i], *at) for i, at in zip(numbers, times, strict=True)]
        self._unshown[rank] += rows
        if time.monotonic() - self._shown_at > _SHOW_S:
            self.show()
        return rows

    def show(self) -> None:
        """Have the dashboard show what was added."""
        self._shown_at = time.monotonic()
        for rank, (address, rows) in enumerate(zip(self._workers, self._unshown, strict=True)):
            if rows:
                shown = [(name, _ACTIONS[kind], *times) for name, kind, *times in rows]
                about = {"worker": address, "thread": rank, "rows": shown}
                internals.tell_scheduler(self._client, {"op": RAN, **about})
                rows.clear()
