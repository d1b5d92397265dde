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
from taskgrad.worker_names import WorkerName

S = TypeVar("S")
T = TypeVar("T")

HERE = WorkerName("none: a thread of this process")
"""What messages name instead of a worker's address."""

# How many threads a map may start in a thread of another map.
_allowance: contextvars.ContextVar[int | None] = contextvars.ContextVar("allowance", default=None)


def threads_here() -> int:
    """How many threads a map may use: in a task its worker's number, else the number of cores.

    In a thread of another map, that thread's share of them.
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


def run_all(job: Callable[[S, Callable[[], bool]], T], items: Sequence[S], threads: int) -> list[T]:
    """Call `job` with each item, in this many threads; the results in order.

    If calls raise, the error of the first of them in the order of the items is raised. Those before
    it run to their end; for those after it the second argument of `job`, a function, returns True.
    """
    failed: list[int] = []

    def call(position: int) -> T:
        return job(items[position], lambda: any(other < position for other in failed))

    threads = min(threads, len(items))
    if threads < 2:
        return list(map(call, range(len(items))))
    refuse_modes("tg.map over threads", process=False)
    context = contextvars.copy_context()
    context.run(_allowance.set, max(1, threads_here() // threads))
    settings, inference = thread_settings(), torch.is_inference_mode_enabled()

    def work(position: int) -> T:
        try:
            with torch.inference_mode(inference), in_thread(settings, HERE):
                return context.copy().run(call, position)
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


_torch_threads = threading.Lock()
_users = 0
_before = 0


@contextlib.contextmanager
def fewer_torch_threads(threads: int) -> Iterator[None]:
    """Divide the number of threads that torch uses in each operation by `threads` meanwhile.

    It is a setting of the process: the first user changes it, the last one restores it.
    """
    global _before, _users
    with _torch_threads:
        if not _users:
            _before = torch.get_num_threads()
            torch.set_num_threads(max(1, _before // threads))
        _users += 1
    try:
        yield
    finally:
        with _torch_threads:
            _users -= 1
            if not _users:
                torch.set_num_threads(_before)
