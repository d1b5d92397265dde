"""Worker: have glibc keep freed memory; warn of too many threads.

Dask's nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``, so that freed memory is returned
to the system at once, and Dask can tell what a worker uses. A training step allocates and frees the
same few hundred megabytes each time; with every page mapped anew, ResNet-50 spends more than a
quarter of its time in the kernel. ``mallopt`` changes this in a running process, so it works on
clusters that we did not start.

The settings are the process's: they stay while any of its workers wants them.
"""

from __future__ import annotations

import contextlib
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
from taskgrad.worker_names import WorkerName

logger = logging.getLogger("taskgrad")

# From malloc.h, and by name, for environment variables and tunables.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_PARAMETERS = {
    "trim_threshold": _TRIM_THRESHOLD,
    "top_pad": _TOP_PAD,
    "mmap_threshold": _MMAP_THRESHOLD,
}

_MIB = 2**20
# Free memory at the end of a heap is kept up to the first; the heaps of threads, 64 MiB each, are
# kept because of the second; blocks below the third are allocated on heaps, not mapped.
_KEPT = {_TRIM_THRESHOLD: 1024 * _MIB, _TOP_PAD: 64 * _MIB, _MMAP_THRESHOLD: 1024 * _MIB}
# Older versions of glibc refuse a larger value than this.
_LARGEST_MMAP_THRESHOLD = 32 * _MIB

# What glibc starts with if the environment sets any of them.
_FIXED = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024}
# If it sets none, glibc raises two of them while a process runs, up to these, until a program sets
# one. That cannot be undone, so restoring sets the values that it would have reached.
_RAISED = {**_FIXED, _TRIM_THRESHOLD: 64 * _MIB, _MMAP_THRESHOLD: 32 * _MIB}

# Fractions of the memory limit, below those at which Dask spills (70 %) and pauses (80 %).
_RELIEF = 0.6
_RELIEF_EVERY = 1000  # ms
_RELIEF_NAME = "taskgrad-relief"

_lock = threading.Lock()
_wanted_by: weakref.WeakSet[Worker] = weakref.WeakSet()


def apply(worker: Worker) -> bool:
    """Have this worker's process keep the memory that it frees; returns whether it does.

    Called in the worker's event loop. Without glibc nothing happens, which is logged once.
    """
    libc = _glibc()
    if libc is None:
        _log_that_nothing_happens()
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
    """Undo `apply` for this worker; with the last of a process, return kept memory."""
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
    """Return kept memory to the system if the worker is short of it; returns whether it was.

    Dask spills and pauses by the size of the process, and could wait forever for memory that is
    free but kept. glibc cannot return the end of each thread's last heap, 64 MiB at most.
    """
    libc, used = _glibc(), internals.memory_used(worker)
    limit = internals.memory_limit(worker)
    if libc is None or used is None or limit is None or used < _RELIEF * limit:
        return False
    libc.malloc_trim(0)
    return True


def give_back() -> None:
    """Return all memory that is free and kept to the system, if the C library is glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _relieve(worker: Worker) -> None:
    relieve(worker)


def values_before(environment: Any) -> dict[int, int]:
    """The ``mallopt`` values that restore a process with these environment variables.

    glibc cannot be asked for its values, so they are derived as it does when it starts.
    """
    found: dict[int, int] = {}
    for setting in environment.get("GLIBC_TUNABLES", "").split(":"):
        name, _, text = setting.partition("=")
        if name.startswith("glibc.malloc."):
            _read(found, name.removeprefix("glibc.malloc."), text)
    for name in _PARAMETERS:
        _read(found, name, environment.get(f"MALLOC_{name.upper()}_", ""))
    return {**(_FIXED if found else _RAISED), **found}


def check_threads(worker: Worker) -> str | None:
    """The warning that a worker runs more threads than its machine has cores, also logged; or None.

    taskgrad sets no number of threads: results depend on it to the bit, and Dask's nanny starts
    workers with ``OMP_NUM_THREADS=1``. In workers started otherwise torch uses every core in each
    task.
    """
    tasks, each = internals.threads(worker), torch.get_num_threads()
    if each == 1 or tasks * each <= CPU_COUNT:
        return None
    fits = max(1, CPU_COUNT // tasks)
    message = (
        f"worker {WorkerName(worker.address, worker.name)} runs {tasks} tasks at a time with "
        f"{each} torch threads each, {tasks * each} threads on {CPU_COUNT} cores. They will wait "
        f"for each other: start it with OMP_NUM_THREADS={fits}, or with fewer threads (--nthreads)"
    )
    logger.warning(message)
    return message


def _set(libc: Any, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        # The C argument is an int; glibc itself reads larger ones from the environment.
        accepted = libc.mallopt(parameter, min(value, 2**31 - 1))
        if not accepted and parameter == _MMAP_THRESHOLD:
            libc.mallopt(parameter, min(value, _LARGEST_MMAP_THRESHOLD))


def _read(found: dict[int, int], name: str, text: str) -> None:
    with contextlib.suppress(KeyError, ValueError):
        found[_PARAMETERS[name]] = int(text, 0)


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
def _log_that_nothing_happens() -> None:
    logger.warning(
        "taskgrad leaves the memory allocator of this process as it is: the C library is not "
        "glibc, so nothing is known to be gained"
    )
