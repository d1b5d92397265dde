"""Calls of kernels by a team of threads, as many as torch uses.

Where torch's threads are OpenMP's, kernels run on those: just after an operation of torch they are
still spinning, each on its own core, and each Python thread has its own team. Elsewhere, and in a
forked child, where the parent's team does not exist, a thread pool is used. The bits do not depend
on which thread computes which item, as items are independent.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from taskgrad.kernels.codegen.work_stealing import (
    BACKWARDS,
    FAILED,
    ZERO_DIVISION,
    call_descriptor,
    reset,
)
from taskgrad.kernels.runtime.kernel_cache import Kernel
from taskgrad.kernels.runtime.memory import aligned_buffer

# Elements up to which waking a second thread costs more than it saves.
ONE_THREAD = 65_536

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_forked = False
_local = threading.local()


@dataclass(slots=True)
class CallStats:
    """The last call, for `explain`: threads, items, bytes read and written, seconds."""

    threads: int
    items: int
    bytes: int
    seconds: float


def run(
    kernel: Kernel,
    items: int,
    addresses: Sequence[int],
    *,
    meta: int,
    scratch: int = 0,
    shared: int = 0,
    threads: int = 1,
    backwards: bool = False,
) -> int:
    """Call a kernel for all items; returns how many threads took part, at most `threads`.

    Each gets `scratch` bytes of memory; `shared` bytes for all of them are the last operand. The
    other parameters are those of `call_descriptor`; `backwards` begins with the last items.
    """
    threads = max(1, min(threads, items))
    call = call_descriptor(
        items,
        addresses,
        meta=meta,
        scratch=_scratch(scratch * threads + shared) if scratch else 0,
        scratch_size=scratch,
        threads=threads,
        thread_id=thread_id_function(),
        chunked=backwards,
    )
    call[BACKWARDS] = backwards
    prepare(kernel, call.buffer_info()[0], threads)()
    if call[FAILED]:
        _fail(kernel, call)
    return threads


def _fail(kernel: Kernel, call: array[int]) -> None:
    """Raise the error of a call that failed."""
    if call[FAILED] == ZERO_DIVISION:
        # The type that torch raises; the name, since the traceback ends here.
        raise RuntimeError(f"ZeroDivisionError: an integer is divided by 0 in {kernel.name}")
    reset(call)
    if kernel.fail is not None:
        kernel.fail(call.buffer_info()[0])
    raise RuntimeError(f"{kernel.name} failed, and did not when it was called again")


def prepare(kernel: Kernel, call: int, threads: int) -> Callable[[], None]:
    """A callable that makes the call whose descriptor has this address."""
    if threads == 1:
        return functools.partial(kernel.run, call)
    team = _openmp()
    if team is None:
        return functools.partial(_run_in_pool, kernel, call, threads)
    return functools.partial(team.start, kernel.address, call, threads, 0)


def _scratch(size: int) -> int:
    """The address of this thread's scratch memory, of at least this many bytes."""
    held: tuple[torch.Tensor, int] | None = getattr(_local, "scratch", None)
    if held is None or _local.size < size:
        held, _local.size = aligned_buffer(size), size
        _local.scratch = held
    return held[1]


def thread_id_function() -> int:
    """The address of a C function that returns a thread's number in its team; 0 for our pool."""
    team = _openmp()
    return 0 if team is None else team.thread_id


class _Team(NamedTuple):
    """The OpenMP that torch uses."""

    start: Callable[[int, int, int, int], None]  # function, argument, threads, flags
    thread_id: int  # the address of omp_get_thread_num


@cache
def _openmp() -> _Team | None:
    is_openmp = "OpenMP" in torch.__config__.parallel_info()
    if _forked or not is_openmp or not sys.platform.startswith("linux"):
        return None
    try:  # found in the library itself or in those that it is linked with
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    start.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    start.restype = None
    return _Team(start, ctypes.cast(number, ctypes.c_void_p).value or 0)


def _run_in_pool(kernel: Kernel, call: int, threads: int) -> None:
    others: list[Future[None]] = [
        _thread_pool().submit(kernel.run, call) for _ in range(threads - 1)
    ]
    kernel.run(call)
    for other in others:
        # All items are taken, so a thread that has not started need not.
        if not other.cancel():
            other.result()


def _thread_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, 32), "taskgrad-kernel")
        return _pool


def _after_fork() -> None:
    """A forked child has only the thread that forked."""
    global _pool, _pool_lock, _forked
    _pool, _pool_lock, _forked = None, threading.Lock(), True
    _openmp.cache_clear()


os.register_at_fork(after_in_child=_after_fork)
