"""Batch norm whose running statistics are those of the whole batch, whatever the microbatches.

As torchgpipe's DeferredBatchNorm (Kim et al., 2020): each microbatch is still normalized by its
own statistics, but only sums are kept of it; when the step commits, the running statistics move
once, by mean and variance over all of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class Sums:
    """Of one batch norm's inputs in a step, by channel."""

    total: torch.Tensor
    squares: torch.Tensor
    count: int


@contextmanager
def deferred(modules: Sequence[nn.Module], sums: dict[_BatchNorm, Sums]) -> Iterator[None]:
    """While these modules run in training mode, add to the sums and leave the statistics alone."""
    norms = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    handles = [m.register_forward_pre_hook(_counter(sums)) for m in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, handle in zip(norms, handles, strict=True):
            norm.track_running_stats = True
            handle.remove()


def _counter(sums: dict[_BatchNorm, Sums]) -> Any:
    def count(norm: _BatchNorm, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].detach()
        others = [d for d in range(x.dim()) if d != 1]
        total, squares = x.sum(others), x.square().sum(others)
        known = sums.get(norm)
        if known is not None:
            total, squares = known.total + total, known.squares + squares
        count = (known.count if known else 0) + x.numel() // x.shape[1]
        sums[norm] = Sums(total, squares, count)

    return count


def commit(sums: dict[_BatchNorm, Sums]) -> None:
    """Move the running statistics by those of the batch, as one forward of all of it would."""
    for norm, found in sums.items():
        if norm.running_mean is None or norm.running_var is None:
            continue
        mean = found.total / found.count
        variance = (found.squares / found.count - mean.square()).clamp_(min=0)
        unbiased = variance * (found.count / max(1, found.count - 1))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
        momentum = norm.momentum
        if momentum is None:  # a plain average over all batches
            momentum = 1 / float(norm.num_batches_tracked or 1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    sums.clear()
