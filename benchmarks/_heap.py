"""The heap of processes that are not taskgrad's workers."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """As taskgrad does in workers; glibc only, like that."""
    libc = ctypes.CDLL(None)
    for parameter in (-1, -3):  # trim threshold, mmap threshold
        libc.mallopt(parameter, 1 << 30)
