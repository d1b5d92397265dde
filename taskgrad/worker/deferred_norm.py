"""Batch norm whose running statistics are those of the whole batch, whatever the microbatches.

As torchgpipe's DeferredBatchNorm (Kim et al., 2020): each microbatch is still normalized by its
own statistics, and its count, mean and squared deviations are recorded; when the step commits, the
running statistics move once from where they were, by mean and variance over all of the batch. These
are combined as Chan, Golub and LeVeque (1979) do it, in float64: nothing large is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Moments:
    """Mean of a batch norm's inputs by channel, and sum of squared deviations from it."""

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def to(self, device: torch.device | str) -> Moments:
        """The same on a device."""
        return Moments(self.count, self.mean.to(device), self.squares.to(device))


First = tuple[int, str]
"""The first step of a task: the index of its layer, and its name, another one in each call."""


@dataclass
class Recorded:
    """The statistics of one batch norm in a step.

    `before` are its running statistics as the step found them. `calls` has the moments of each of
    its calls in one forward of the model, by microbatch: in the task that starts with this layer,
    the call of this number.
    """

    before: dict[str, torch.Tensor]
    calls: dict[tuple[First, int], dict[int, Moments]] = field(default_factory=dict)


Statistics = dict[_BatchNorm, Recorded]
Given = dict[int, dict[tuple[First, int], dict[int, Moments]]]
"""The `calls` of batch norms, by their place among those of a shard."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def deferred(
    modules: Iterable[nn.Module], found: Statistics, microbatch: int, first: First
) -> Iterator[None]:
    """Record the statistics of what is normalized while a microbatch passes these modules.

    They are all modules, each once; `first` is the first step of the task that runs them.
    """
    with ExitStack() as regions:
        for norm in _norms(modules):
            regions.enter_context(_watched(norm, found, microbatch, first))
        yield


@contextmanager
def _watched(norm: _BatchNorm, found: Statistics, microbatch: int, first: First) -> Iterator[None]:
    count = 0

    def record(x: torch.Tensor) -> None:
        nonlocal count
        found[norm].calls.setdefault((first, count), {})[microbatch] = _moments(x.detach())
        count += 1

    def normalizes() -> TorchFunctionMode:
        if norm not in found:
            buffers = {name: getattr(norm, name) for name in _BUFFERS}
            found[norm] = Recorded({n: b.clone() for n, b in buffers.items() if b is not None})
        return _Normalized(norm, record)

    with in_forwards(norm, normalizes):
        yield


@contextmanager
def in_forwards(module: nn.Module, make: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """Have each forward of a module in the block run in a mode that `make` makes."""
    modes: list[TorchFunctionMode] = []

    def enter(*_: Any) -> None:
        modes.append(make())
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while modes:  # torch calls no hooks for what is no Exception
            leave()


class _Normalized(TorchFunctionMode):
    """Records what a batch norm normalizes, after its class has prepared the input."""

    def __init__(self, norm: _BatchNorm, record: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._norm = norm
        self._record = record

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            running = given.get("running_mean")
            if given.get("training") and running is not None and running is self._norm.running_mean:
                self._record(given["input"])
        return result


def _moments(x: torch.Tensor) -> Moments:
    others = [d for d in range(x.dim()) if d != 1]
    x = x.double()
    mean = x.mean(others, keepdim=True)
    squares = (x - mean).square_().sum(others)
    return Moments(x.numel() // x.shape[1], mean.flatten(), squares)


def given(found: Statistics, modules: Iterable[nn.Module]) -> Given:
    """The moments of these modules' batch norms, to be sent to other replicas of them."""
    place = {norm: i for i, norm in enumerate(_norms(modules))}
    return {
        place[norm]: {
            at: {m: moments.to("cpu") for m, moments in by_microbatch.items()}
            for at, by_microbatch in recorded.calls.items()
        }
        for norm, recorded in found.items()
    }


def take(found: Statistics, modules: Iterable[nn.Module], others: Iterable[Given]) -> None:
    """Add the moments that other replicas recorded, of other microbatches."""
    norms = _norms(modules)
    for moments in others:
        for place, calls in moments.items():
            recorded = found.setdefault(norms[place], Recorded({}))
            running = norms[place].running_mean
            device = "cpu" if running is None else running.device  # where this shard's own are
            for at, by_microbatch in calls.items():
                here = {m: found.to(device) for m, found in by_microbatch.items()}
                recorded.calls.setdefault(at, {}).update(here)


def _norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    return [module for module in modules if isinstance(module, _BatchNorm)]


def commit(found: Statistics) -> None:
    """Move the running statistics by those of the batch, as one forward of all of it would."""
    for norm, recorded in found.items():
        for name, before in recorded.before.items() if recorded.calls else ():
            getattr(norm, name).copy_(before)
        for _, by_microbatch in sorted(recorded.calls.items()):
            _move(norm, reduce(Moments.__add__, (m for _, m in sorted(by_microbatch.items()))))
    found.clear()


def _move(norm: _BatchNorm, moments: Moments) -> None:
    momentum, batches = norm.momentum, norm.num_batches_tracked
    if batches is not None:
        batches += 1
    if momentum is None:  # a plain average over all batches
        momentum = 0.0 if batches is None else 1 / float(batches)
    unbiased = moments.squares / max(1, moments.count - 1)
    for running, value in ((norm.running_mean, moments.mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(running.double().lerp(value, momentum))
