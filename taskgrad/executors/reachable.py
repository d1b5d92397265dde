"""Driver: connect with workers, or remember which ones cannot be reached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from taskgrad.cluster.session import Session, check_open
from taskgrad.errors import TaskgradError
from taskgrad.worker_names import WorkerName

T = TypeVar("T")
Workers = tuple[WorkerName, ...]
logger = logging.getLogger("taskgrad")


class Reachable:
    """Which workers can be connected with; `instead` says what happens otherwise, for the log."""

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._not: set[Workers] = set()

    def connected(self, session: Session, workers: Workers, connect: Callable[[], T]) -> T | None:
        """What `connect` gives; None if it raises OSError or TaskgradError, or has for these."""
        if workers in self._not:
            return None
        try:
            return connect()
        except (TaskgradError, OSError) as error:
            check_open(session.client)
            why = error.__cause__ or str(error).partition(". ")[0]
            logger.info("%s: the workers cannot be reached: %s", self._instead, why)
            self._not.add(workers)
            return None
