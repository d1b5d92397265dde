"""Driver, worker: read another process's memory, with Linux's ``process_vm_readv``.

Also called cross-memory attach. TCP within a host copies every byte twice, a few hundred kilobytes
at a time, and wakes both processes for each piece. Here the kernel copies once, directly to the
destination.

A process may read those that it may trace (``man 2 ptrace``): of the same user, unless Yama, a
seccomp profile or another pid namespace forbids it. So callers probe first (see
`taskgrad.cluster.wire.peers`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from taskgrad.cluster.wire import thresholds

_THREADS = min(CPU_COUNT, 4)
_ALIGNMENT = 64
# Pieces per call (IOV_MAX).
_PIECES = 1024

_Part = tuple[int, int, int]  # remote address, local address, bytes


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def available() -> bool:
    """True if this system has the call, which may still forbid a read."""
    return _call(ctypes.CDLL) is not None


def address_of(buffer: memoryview) -> int:
    """The address of a buffer, also of a read-only one."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def allocate(nbytes: int) -> memoryview:
    """Memory to read into, aligned like torch's.

    From NumPy, which asks the kernel for huge pages from 4 MiB on. There are 512 times fewer of
    them to map, and for `read` to look up: it takes half as long.
    """
    some = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    start = -some.__array_interface__["data"][0] % _ALIGNMENT
    return some[start : start + nbytes].data


def read(pid: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each view with that process's memory at the address that comes with it.

    OSError if the process is gone, has no such memory, or may not be read.
    """
    parts = [(there, address_of(view), view.nbytes) for there, view in pieces]
    total = sum(size for _, _, size in parts)
    if total <= thresholds.READ_WITH_GIL_MAX:
        _read(ctypes.PyDLL, pid, parts)
        return
    # One share a thread, one call a share: each call waits for the GIL once.
    mine, *others = _shares(
        parts, total, _THREADS if total >= thresholds.READ_IN_THREADS_MIN else 1
    )
    helpers = [_helpers().submit(_read, ctypes.CDLL, pid, share) for share in others]
    try:
        _read(ctypes.CDLL, pid, mine)
    finally:  # on an error too: they must not write to freed memory
        errors = [helper.exception() for helper in helpers]
    for error in errors:
        if error is not None:
            raise error


def _shares(parts: list[_Part], total: int, count: int) -> list[list[_Part]]:
    """Split the same bytes into `count` lists of equal size."""
    size = -(-total // count)
    shares: list[list[_Part]] = [[]]
    room = size
    for there, here, length in parts:
        done = 0
        while done < length:
            if not room:
                shares.append([])
                room = size
            step = min(room, length - done)
            shares[-1].append((there + done, here + done, step))
            done += step
            room -= step
    return shares


def _read(library: Any, pid: int, parts: list[_Part]) -> None:
    call = _call(library)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while parts:
        some = parts[:_PIECES]
        count = len(some)
        here = (_Iovec * count)(*(_Iovec(part[1], part[2]) for part in some))
        there = (_Iovec * count)(*(_Iovec(part[0], part[2]) for part in some))
        got = call(pid, here, count, there, count, 0)
        if got <= 0:
            code = ctypes.get_errno() if got else errno.EFAULT
            raise OSError(code, f"cannot read the memory of process {pid}: {os.strerror(code)}")
        parts = _after(parts, got)


def _after(parts: list[_Part], got: int) -> list[_Part]:
    """The parts that remain after a read of `got` bytes: the kernel may stop early."""
    for i, (there, here, length) in enumerate(parts):
        if got < length:
            return [(there + got, here + got, length - got), *parts[i + 1 :]]
        got -= length
    return []


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _THREADS - 1), thread_name_prefix="taskgrad-read")


@cache
def _call(library: Any) -> Any:
    """``process_vm_readv``; with ``PyDLL`` a call keeps the GIL, with ``CDLL`` it does not."""
    try:
        call = library(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError, TypeError):
        return None
    vector, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
    call.argtypes = (ctypes.c_int, vector, count, vector, count, count)
    call.restype = ctypes.c_ssize_t
    return call
