"""Activation checkpointing: keep the input of some layers, run them again in the backward.

Chen et al., 2016, through ``torch.utils.checkpoint``. What that does not know is added here: random
numbers come from the same streams because each layer draws from its own, and buffers (batch norm's
statistics) are for the second run what they were for the first, and afterwards as if there had been
no second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from taskgrad.worker.communicator import Communicator, running, running_as


def recomputed(
    run: Callable[..., Any], modules: Iterable[nn.Module], *args: Any, **kwargs: Any
) -> Any:
    """``run(*args, **kwargs)``, which keeps nothing for its backward but the arguments."""
    buffers = [b for m in modules for b in m.buffers()]
    first = [b.detach().clone() for b in buffers]
    ran = False
    comm = running()
    # The graph must not keep the rank, which keeps the graph.
    rank: Callable[[], Communicator | None]
    rank = (lambda: None) if comm is None else weakref.ref(comm)

    def once_more(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        if not ran:
            ran = True
            return run(*args, **kwargs)
        now = [b.detach().clone() for b in buffers]
        _write(buffers, first)
        try:
            with running_as(rank()):  # of a device, backwards run in a thread of torch's
                return run(*args, **kwargs)
        finally:
            _write(buffers, now)

    # Stopping early is an exception through the layers, which would be reported as theirs.
    with set_checkpoint_early_stop(False):
        return checkpoint(once_more, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _write(buffers: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Past autograd's count of writes: the backward under way may have saved these."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)
