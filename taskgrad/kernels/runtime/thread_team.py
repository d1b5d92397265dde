"""Calls of kernels whose items several threads share, as many as torch uses.

Where torch's threads are OpenMP's, the kernel runs on those: they are awake when an operation of
torch has just ended, each on a core of its own, and each Python thread has its own team of them.
Elsewhere, and in a forked child, whose parent's team is not there, they are our own. Who computes
which item does not matter to the bits: no item depends on another.
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
    FAILED,
    FROM_END,
    ZERO_DIVISION,
    begin_again,
    row_of,
)
from taskgrad.kernels.runtime.kernel_cache import Kernel

# Elements below which waking a thread costs more than it saves.
ALONE = 65_536

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_forked = False
_scratch = threading.local()


@dataclass(slots=True)
class LastCall:
    """What the last call did, for `explain`: threads, items that they shared, bytes, seconds."""

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
    from_end: bool = False,
) -> int:
    """Call a kernel for all its items; how many threads took part.

    Parameters
    ----------
    kernel : Kernel
    items : int
    addresses : sequence of int
        Of its operands.
    meta : int
        The address of the numbers that its layout passes.
    scratch : int
        Bytes of memory that each thread needs.
    shared : int
        Bytes of memory that they need together, where they need any; its address is one more
        operand, the last.
    threads : int
        At most so many.
    from_end : bool
        Whether the last items come first.
    """
    threads = max(1, min(threads, items))
    place = _scratch_of(scratch * threads + shared) if scratch else 0
    call = row_of(
        items,
        addresses,
        meta=meta,
        place=place,
        scratch=scratch,
        threads=threads,
        who=who(),
        turns=from_end,
    )
    call[FROM_END] = from_end
    address = call.buffer_info()[0]
    start_of(kernel, address, threads)()
    if call[FAILED]:
        _fail(kernel, call)
    return threads


def _fail(kernel: Kernel, call: array[int]) -> None:
    """Raise what a call could not."""
    if call[FAILED] == ZERO_DIVISION:
        # torch's own error and type; the name, since its stack ends here.
        raise RuntimeError(f"ZeroDivisionError: an integer is divided by 0 in {kernel.name}")
    begin_again(call)
    if kernel.fail is not None:
        kernel.fail(call.buffer_info()[0])
    raise RuntimeError(f"{kernel.name} failed, and did not when it was called again")


def start_of(kernel: Kernel, address: int, threads: int) -> Callable[[], None]:
    """What has so many threads make the call at this address."""
    if threads == 1:
        return functools.partial(kernel.run, address)
    team = _openmp()
    if team is None:
        return functools.partial(_share, kernel, address, threads)
    return functools.partial(team.start, kernel.address, address, threads, 0)


def _scratch_of(size: int) -> int:
    """The address of this thread's own memory of at least this many bytes, on a cache line."""
    held: torch.Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size + 64:
        held = _scratch.held = torch.empty(size + 64, dtype=torch.uint8)
    return -(-held.data_ptr() // 64) * 64


def who() -> int:
    """The address of a C function that tells a thread its number in its team; 0 for our own."""
    team = _openmp()
    return 0 if team is None else team.number


class _Team(NamedTuple):
    """The OpenMP that torch uses.

    Attributes
    ----------
    start : callable
        Starts a team: function, argument, threads, flags.
    number : int
        The address of a C function that tells a thread its number.
    """

    start: Callable[[int, int, int, int], None]
    number: int


@cache
def _openmp() -> _Team | None:
    is_openmp = "OpenMP" in torch.__config__.parallel_info()
    if _forked or not is_openmp or not sys.platform.startswith("linux"):
        return None
    try:  # found in the library itself or in what it is linked with
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    start.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    start.restype = None
    return _Team(start, ctypes.cast(number, ctypes.c_void_p).value or 0)


def _share(kernel: Kernel, address: int, threads: int) -> None:
    others: list[Future[None]] = [
        _own_threads().submit(kernel.run, address) for _ in range(threads - 1)
    ]
    kernel.run(address)
    for other in others:
        # One that has not started yet is not needed any more: all items are taken.
        if not other.cancel():
            other.result()


def _own_threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, 32), "taskgrad-kernel")
        return _pool


def _after_fork() -> None:
    """A forked child has no threads but the one that forked."""
    global _pool, _pool_lock, _forked
    _pool, _pool_lock, _forked = None, threading.Lock(), True
    _openmp.cache_clear()


os.register_at_fork(after_in_child=_after_fork)
