"""Run jobs in threads of this process, with the settings of the caller's thread.

Those are torch's grad mode, autocast and default device, and the context variables.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from taskgrad.cluster.nested import current_worker
from taskgrad.graph.torch_settings import refuse_modes, thread_settings
from taskgrad.worker.settings import in_thread

S = TypeVar("S")
T = TypeVar("T")

# How many threads a map may start in a thread of another map.
_allowance: contextvars.ContextVar[int | None] = contextvars.ContextVar("allowance", default=None)


def threads_here() -> int:
    """How many threads a map may use: a worker's number in a task, else the number of cores.

    In a thread of another map it is its share of those.
    """
    allowed = _allowance.get()
    if allowed is not None:
        return allowed
    worker = current_worker()
    if worker is not None:
        return int(worker.state.nthreads)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CancelToken:
    """Cancels one of several jobs once a job before it has failed."""

    def __init__(self, position: int, failed: list[int]) -> None:
        self._position = position
        self._failed = failed

    def is_cancelled(self) -> bool:
        """True if the job's result will not be used."""
        return any(other < self._position for other in self._failed)


def run_all(job: Callable[[S, CancelToken], T], items: Sequence[S], threads: int) -> list[T]:
    """Call `job` with each item, in this many threads; the results in order.

    If calls raise, the error of the first of them in the order of the items is raised: those before
    it run to their end, those after it are cancelled.
    """
    failed: list[int] = []
    tokens = [CancelToken(position, failed) for position in range(len(items))]
    threads = min(threads, len(items))
    if threads < 2:
        return [job(item, token) for item, token in zip(items, tokens, strict=True)]
    refuse_modes("tg.map over threads", process=False)
    carry = _carrier(max(1, threads_here() // threads))

    def work(position: int) -> T:
        try:
            return carry(lambda: job(items[position], tokens[position]))
        except BaseException:
            failed.append(position)
            raise

    with fewer_torch_threads(threads), ThreadPoolExecutor(threads, "taskgrad-map") as pool:
        futures: list[Future[T]] = [pool.submit(work, p) for p in range(len(items))]
        try:
            return [future.result() for future in futures]
        except BaseException:
            failed.append(-1)
            for future in futures:
                future.cancel()
            raise


def _carrier(allowance: int) -> Callable[[Callable[[], T]], T]:
    """A function that calls another one, in any thread, with this thread's settings."""
    context = contextvars.copy_context()
    context.run(_allowance.set, allowance)
    settings, inference = thread_settings(), torch.is_inference_mode_enabled()

    def carry(call: Callable[[], T]) -> T:
        with torch.inference_mode(inference), in_thread(settings, "none: a thread of this process"):
            return context.copy().run(call)

    return carry


_torch_threads = threading.Lock()
_users: list[int] = []
_before = 0


@contextlib.contextmanager
def fewer_torch_threads(threads: int) -> Iterator[None]:
    """Divide the number of threads that torch uses in each operation by `threads` meanwhile.

    It is a setting of the process: the first user changes it, the last one restores it.
    """
    global _before
    with _torch_threads:
        if not _users:
            _before = torch.get_num_threads()
            torch.set_num_threads(max(1, _before // threads))
        _users.append(threads)
    try:
        yield
    finally:
        with _torch_threads:
            _users.pop()
            if not _users:
                torch.set_num_threads(_before)
