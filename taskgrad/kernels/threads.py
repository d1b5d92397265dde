"""Blocks of a kernel shared among threads, as many as torch uses.

The threads are our own. Numba's are not safe from several Python threads on every machine, and they
spin beside torch's; a kernel that lets go of Python's lock needs neither. Who computes which block
does not matter to the bits: no block depends on another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

# Elements below which waking a thread costs more than it saves.
ALONE = 65_536
# Pieces a thread, so that one that is held up does not hold up all.
_PIECES = 8

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_scratch = threading.local()


def scratch(size: int) -> int:
    """The address of this thread's own memory of at least this many bytes, on a cache line."""
    held: torch.Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size + 64:
        held = _scratch.held = torch.empty(size + 64, dtype=torch.uint8)
    return -(-held.data_ptr() // 64) * 64


def share(run: Callable[[int, int], None], items: int, threads: int) -> int:
    """Call ``run(start, stop)`` for pieces of range(items); how many threads took part."""
    threads = min(threads, items)
    if threads <= 1:
        run(0, items)
        return 1
    step = -(-items // (threads * _PIECES))
    starts = iter(range(0, items, step))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            run(start, min(items, start + step))

    others: list[Future[None]] = [_threads().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            # One that has not started yet is not needed any more: all pieces are taken.
            if not other.cancel():
                other.result()
    return threads


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, 32), "taskgrad-kernel")
        return _pool


def _forget_pool() -> None:
    """A forked child has no threads but the one that forked."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
