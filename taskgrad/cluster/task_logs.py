"""Worker: what the log says of tasks of ours that failed, and of a driver that has ended.

Dask logs each failed task as an error of several long lines, with its traceback escaped. The driver
of a task of ours raises the error itself, in full. And a program that trains is a task that still
runs when a script ends. So of these one line is left, at level INFO, which the workers of a
``LocalCluster`` do not print. What Dask logs of other tasks stays as it is.

A worker whose parent process is gone is about to end: that it misses its scheduler is not logged.
That the scheduler has removed it, as it does when a cluster closes, is at level INFO, too; if there
was another reason, the scheduler's log has that.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Worker

from taskgrad.cluster import internals

# The modules of the functions of our tasks, all of whose errors reach the driver.
_MODULES = (
    "taskgrad.cluster.tasks",
    "taskgrad.cluster.program_hosts",
    "taskgrad.streaming.serving",
)


@functools.cache
def shorten(workers: Callable[[], Iterable[Worker]]) -> None:
    """Log what ends tasks of ours in one line; `workers` returns the workers of this process."""

    parent = multiprocessing.parent_process()

    def is_kept(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(internals.NO_SCHEDULER):
            return parent is None or parent.is_alive()
        ended = internals.ended_task(record)
        if ended is not None and any(_is_ours(worker, ended.key) for worker in workers()):
            record.msg, record.args = "%s ended without a result: %s", ended
        elif record.msg != internals.REMOVED:
            return True
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return logging.getLogger(record.name).isEnabledFor(logging.INFO)

    for name in internals.WORKER_LOGS:
        logging.getLogger(name).addFilter(is_kept)


def _is_ours(worker: Worker, key: Any) -> bool:
    return getattr(internals.function_of(worker, key), "__module__", None) in _MODULES
