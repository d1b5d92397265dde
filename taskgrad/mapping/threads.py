"""Jobs in threads of this process, under what holds in the caller's thread.

torch's grad mode, autocast, default device and the context variables belong to a thread; a function
that is mapped over threads is to see those of the caller.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import distributed
import torch

from taskgrad.graph.torch_settings import refuse_modes, thread_settings
from taskgrad.worker.settings import in_thread

T = TypeVar("T")

# How many threads a map may start from here; None: nobody has said.
_allowance: contextvars.ContextVar[int | None] = contextvars.ContextVar("allowance", default=None)


def worker_here() -> distributed.Worker | None:
    """The Dask worker in whose task this runs, if it does."""
    try:
        return distributed.get_worker()
    except ValueError:
        return None


def threads_here() -> int:
    """How many threads a map may use: a worker's own number in a task, else the cores there are.

    In a thread of a map it is what that leaves.
    """
    allowed = _allowance.get()
    if allowed is not None:
        return allowed
    worker = worker_here()
    if worker is not None:
        return int(worker.state.nthreads)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CancelToken:
    """Tells one of several jobs whether it shall go on: not once one before it has failed."""

    def __init__(self, position: int, failed: list[int]) -> None:
        self._position = position
        self._failed = failed

    def is_wanted(self) -> bool:
        """Whether what this job makes is still of use."""
        return all(self._position <= other for other in self._failed)


def run_all(jobs: Sequence[Callable[[CancelToken], T]], threads: int) -> list[T]:
    """What the jobs give, in order, so many at a time.

    If some raise, the error of the first of them in order is raised, whatever the threads did:
    those before it end, those after it are told to stop.
    """
    failed: list[int] = []
    tokens = [CancelToken(position, failed) for position in range(len(jobs))]
    threads = min(threads, len(jobs))
    if threads < 2:
        return [job(token) for job, token in zip(jobs, tokens, strict=True)]
    refuse_modes("tg.map over threads", process=False)
    carry = _carrier(max(1, threads_here() // threads))

    def work(position: int) -> T:
        try:
            return carry(lambda: jobs[position](tokens[position]))
        except BaseException:
            failed.append(position)
            raise

    with fewer_torch_threads(threads), ThreadPoolExecutor(threads, "taskgrad-map") as pool:
        futures: list[Future[T]] = [pool.submit(work, p) for p in range(len(jobs))]
        try:
            return [future.result() for future in futures]
        except BaseException:
            failed.append(-1)
            for future in futures:
                future.cancel()
            raise


def _carrier(allowance: int) -> Callable[[Callable[[], T]], T]:
    """A function that calls another one, in any thread, as if in this one."""
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
    """Meanwhile torch uses so many times fewer threads in each operation.

    The number is the process's: the first who comes sets it, the last who goes sets it back.
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
