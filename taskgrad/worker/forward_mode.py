"""Forward-mode differentiation in several ranks of one process.

torch has one forward-mode level for all threads of a process. A rank that leaves ``torch.func.jvp``
would end it, and with it the tangents of another rank that is still inside, waiting for a
collective. So one level is open while any rank runs, and they all use that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch._functorch.eager_transforms as transforms
from torch.autograd import forward_ad

from taskgrad.graph import torch_settings

_lock = threading.Lock()
_users = 0


@contextmanager
def shared_level() -> Iterator[None]:
    """Have a level open in the block."""
    global _users
    with _lock:
        _users += 1
        _open()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _close()


def check_shared() -> None:
    """Raise RuntimeError if a level is open that may end while this rank waits."""
    if not torch_settings.own_levels:
        raise RuntimeError(
            "a collective is differentiated in forward mode (torch.func.jvp, jacfwd) while another "
            "thread of this worker's process does that too: torch has one level for both. Use "
            "reverse mode (vjp, jacrev), or workers of one thread"
        )


def _open() -> None:
    """Open the level, unless one is open: torch counts how often `jvp` is entered."""
    if not torch_settings.own_levels and getattr(transforms, "JVP_NESTING", None) == 0:
        forward_ad.enter_dual_level()
        transforms.JVP_NESTING += 1
        torch_settings.own_levels = 1


def _close() -> None:
    """Close it, unless another thread is using it."""
    if torch_settings.own_levels and transforms.JVP_NESTING == 1:
        transforms.JVP_NESTING -= 1
        forward_ad.exit_dual_level()
        torch_settings.own_levels = 0
