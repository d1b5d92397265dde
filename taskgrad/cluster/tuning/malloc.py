"""glibc keeps freed memory in worker processes; and a word on threads.

Dask's nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``, so that memory that is freed goes
back to the system at once, and Dask can tell what a worker uses. A training step takes and frees
the same few hundred megabytes each time; with every page mapped anew, ResNet-50 spends more than a
quarter of its time in the kernel. ``mallopt`` changes this in a running process, so it works on
clusters that we did not start.

These settings are the process's, and a process may hold several workers: they hold as long as any
of its workers wants them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from functools import cache, partial
from typing import Any

import torch
from dask.system import CPU_COUNT
from distributed import Worker
from tornado.ioloop import PeriodicCallback

from taskgrad.cluster import internals

logger = logging.getLogger("taskgrad")

# From malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

_MIB = 2**20
# Free memory at the end of a heap stays up to the first; the heaps of threads, 64 MiB each, are
# kept because of the second; blocks below the third come from heaps and not from the system.
_KEPT = {_TRIM_THRESHOLD: 1024 * _MIB, _TOP_PAD: 64 * _MIB, _MMAP_THRESHOLD: 1024 * _MIB}
# Older versions of glibc refuse a larger value than this.
_LARGEST_MMAP_THRESHOLD = 32 * _MIB

# What glibc starts with if the environment sets any of them.
_FIXED = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024}
# If it sets none, glibc raises two of them while a process runs, up to these. It stops that once a
# program has set one, and cannot be told to resume: this is where it would have come to.
_RAISED = {**_FIXED, _TRIM_THRESHOLD: 64 * _MIB, _MMAP_THRESHOLD: 32 * _MIB}

_VARIABLES = {
    _TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_",
    _TOP_PAD: "MALLOC_TOP_PAD_",
    _MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_",
}
_TUNABLES = {
    "glibc.malloc.trim_threshold": _TRIM_THRESHOLD,
    "glibc.malloc.top_pad": _TOP_PAD,
    "glibc.malloc.mmap_threshold": _MMAP_THRESHOLD,
}

# Below what Dask's worker starts to spill (70 %) and to pause (80 %).
_RELIEF = 0.6
_RELIEF_EVERY = 1000  # ms
_RELIEF_NAME = "taskgrad-relief"

_lock = threading.Lock()
_wanted_by: weakref.WeakSet[Worker] = weakref.WeakSet()


def apply(worker: Worker) -> bool:
    """Have this worker's process keep the memory that it frees; returns whether it does.

    Called in the worker's event loop. Elsewhere than on glibc nothing happens, and the log says so
    once.
    """
    libc = _glibc()
    if libc is None:
        _say_that_nothing_happens()
        return False
    with _lock:
        _wanted_by.add(worker)
        _set(libc, _KEPT)
    if _RELIEF_NAME not in worker.periodic_callbacks:
        relief = PeriodicCallback(partial(_relieve, worker), _RELIEF_EVERY)
        worker.periodic_callbacks[_RELIEF_NAME] = relief
        relief.start()
    return True


def restore(worker: Worker) -> None:
    """Undo `apply` for this worker; with the last of a process, give back what it kept."""
    relief = worker.periodic_callbacks.pop(_RELIEF_NAME, None)
    if relief is not None:
        relief.stop()
    libc = _glibc()
    with _lock:
        if worker not in _wanted_by:
            return
        _wanted_by.discard(worker)
        if libc is not None and not _wanted_by:
            _set(libc, values_before(os.environ))
            libc.malloc_trim(0)


def relieve(worker: Worker) -> bool:
    """Give back kept memory if the worker is short of it; returns whether it was.

    Dask spills and pauses by the size of the process, and could wait forever for memory that is
    free but kept. What glibc cannot give back is the end of the last heap of each thread, 64 MiB at
    most.
    """
    libc, used = _glibc(), internals.memory_used(worker)
    limit = internals.memory_limit(worker)
    if libc is None or used is None or limit is None or used < _RELIEF * limit:
        return False
    libc.malloc_trim(0)
    return True


def give_back() -> None:
    """Give all memory that is free and kept back to the system, where the C library is glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _relieve(worker: Worker) -> None:
    relieve(worker)


def values_before(environment: Any) -> dict[int, int]:
    """What ``mallopt`` has to be given to undo ours, in a process with these variables.

    glibc cannot be asked for its values, so they are worked out the way it did when it started.
    """
    found: dict[int, int] = {}
    for setting in environment.get("GLIBC_TUNABLES", "").split(":"):
        name, _, text = setting.partition("=")
        if name in _TUNABLES:
            _read(found, _TUNABLES[name], text)
    for parameter, variable in _VARIABLES.items():
        _read(found, parameter, environment.get(variable, ""))
    return {**(_FIXED if found else _RAISED), **found}


def check_threads(worker: Worker) -> str | None:
    """Whether a worker would run more threads than its machine has cores; says so, in the log too.

    taskgrad sets no threads itself: another number gives other bits, and Dask's nanny already
    starts workers with ``OMP_NUM_THREADS=1``. But workers that were started otherwise let torch use
    every core in each of their tasks.
    """
    tasks, each = internals.threads(worker), torch.get_num_threads()
    if each == 1 or tasks * each <= CPU_COUNT:
        return None
    fits = max(1, CPU_COUNT // tasks)
    message = (
        f"worker {worker.address} runs {tasks} tasks at a time with {each} torch threads each, "
        f"{tasks * each} threads on {CPU_COUNT} cores. They will wait for each other: start it "
        f"with OMP_NUM_THREADS={fits}, or with fewer threads (--nthreads)"
    )
    logger.warning(message)
    return message


def _set(libc: Any, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        # The C argument is an int; glibc itself reads larger ones from the environment.
        accepted = libc.mallopt(parameter, min(value, 2**31 - 1))
        if not accepted and parameter == _MMAP_THRESHOLD:
            libc.mallopt(parameter, min(value, _LARGEST_MMAP_THRESHOLD))


def _read(found: dict[int, int], parameter: int, text: str) -> None:
    try:
        found[parameter] = int(text, 0)
    except ValueError:
        return


@cache
def _glibc() -> Any:
    """The C library of this process, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018  there?
    except (OSError, AttributeError, TypeError):
        return None
    return libc


@cache
def _say_that_nothing_happens() -> None:
    logger.warning(
        "taskgrad leaves the memory allocator of this process as it is: the C library is not "
        "glibc, so nothing is known to be gained"
    )
