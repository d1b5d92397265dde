"""Reading another process's memory, with Linux's ``process_vm_readv``: "cross-memory attach".

TCP within a host copies every byte twice, a few hundred kilobytes at a time, and wakes both
processes for each piece. Here the kernel copies once, straight to where the bytes shall be.

It lets a process read where it would let it trace (``man 2 ptrace``): processes of the same user,
unless something forbids it: Yama, a seccomp profile, another pid namespace. So whoever relies on
this tries it first. Elsewhere than on Linux there is nothing to try.
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
# How many pieces one call takes (IOV_MAX).
_PIECES = 1024

_Part = tuple[int, int, int]  # address there, address here, bytes


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def available() -> bool:
    """Whether this system has the call at all; not whether it allows a certain read."""
    return _call(ctypes.CDLL) is not None


def address_of(buffer: memoryview) -> int:
    """Where the bytes of a buffer lie; read-only ones too."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def allocate(nbytes: int) -> memoryview:
    """Memory to read into: aligned as torch's own, warm if the process keeps what it frees.

    From NumPy, which asks the kernel for huge pages (from 4 MiB on). There are 512 times fewer of
    them to map, and for `read` to look up: it takes half as long.
    """
    some = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    start = -some.__array_interface__["data"][0] % _ALIGNMENT
    return some[start : start + nbytes].data


def read(pid: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each view with what lies in that process at the address beside it.

    Raises
    ------
    OSError
        The process is gone, has no such memory, or may not be read.
    """
    parts = [(there, address_of(view), view.nbytes) for there, view in pieces]
    total = sum(size for _, _, size in parts)
    if total <= thresholds.READ_WITH_GIL_MAX:
        _read(ctypes.PyDLL, pid, parts)
        return
    # One share a thread, one call a share: for each call one waits for the GIL once.
    mine, *others = _shares(
        parts, total, _THREADS if total >= thresholds.READ_IN_THREADS_MIN else 1
    )
    helpers = [_helpers().submit(_read, ctypes.CDLL, pid, share) for share in others]
    try:
        _read(ctypes.CDLL, pid, mine)
    finally:  # on an error too: what they write to must not go before they are done
        errors = [helper.exception() for helper in helpers]
    for error in errors:
        if error is not None:
            raise error


def _shares(parts: list[_Part], total: int, count: int) -> list[list[_Part]]:
    """The same bytes in so many lists, each as long as the next."""
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
    """What is left to read when this many bytes are done: the kernel may stop early."""
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
    """``process_vm_readv``; a call keeps the GIL with ``PyDLL`` and not with ``CDLL``."""
    try:
        call = library(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError, TypeError):
        return None
    vector, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
    call.argtypes = (ctypes.c_int, vector, count, vector, count, count)
    call.restype = ctypes.c_ssize_t
    return call
