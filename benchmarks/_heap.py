"""The heap of processes that are not taskgrad's workers."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """As taskgrad does in workers; glibc only, like that."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 1 << 30)  # trim threshold
    libc.mallopt(-2, 1 << 26)  # top pad
    libc.mallopt(-3, 1 << 30)  # mmap threshold
