"""Run a layer or a function for the shapes of what it gives, on values that mean nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from taskgrad.graph.activation import Activation, tensors_in
from taskgrad.graph.stand_ins import meaningless
from taskgrad.graph.swapping import swap

_log = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass
class ShapeRun:
    """What one run gave.

    Attributes
    ----------
    result, args, kwargs
        The result, and the arguments after the run; their tensors are fake.
    touched, changed
        The ids of the fake tensors among the arguments that operations have taken, or written.
    saved
        The bytes that autograd would keep.
    alive
        What has to live on, so that ids of tensors stay theirs.
    """

    result: Any
    args: Any
    kwargs: Any
    touched: set[int]
    changed: set[int] = field(default_factory=set)
    saved: int = 0
    alive: Any = None


def run_on_fakes(
    target: Any, args: Any, kwargs: Any, mode: FakeTensorMode, made: list[torch.Tensor]
) -> ShapeRun:
    """Run on fake tensors; those that are made inside are added to `made`, even if it fails.

    Raises what that does; it fails where values decide on shapes.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor.nbytes
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    watch = _Watch(made)
    was, _log.disabled = _log.disabled, True  # it logs what is an exception, too
    try:
        with mode, watch, hooks:
            result = target(*args, **kwargs)
    finally:
        _log.disabled = was
    return ShapeRun(result, args, kwargs, watch.taken, saved=sum(kept.values()))


def run_on_meaningless(
    run: Callable[[Any, Any], Any],
    args: Any,
    kwargs: Any,
    mode: FakeTensorMode,
    made: list[torch.Tensor],
    stands_for: Mapping[int, Any],
) -> ShapeRun:
    """Run on values of no meaning, where there are none; `stands_for` has tensors of fake ones.

    What is made inside is added to `made`.
    """
    real: dict[int, torch.Tensor] = {}
    fakes: dict[int, torch.Tensor] = {}

    def to_real(fake: torch.Tensor) -> torch.Tensor:
        if id(fake) not in real:
            known = stands_for.get(id(fake))
            if isinstance(known, torch.Tensor) and not isinstance(known, Activation):
                value = known.detach().clone()
            else:
                value = meaningless(fake)
            real[id(fake)] = value.requires_grad_(fake.requires_grad)
            if fake.requires_grad:  # not a leaf: it may be written
                real[id(fake)] = real[id(fake)].clone()
            fakes[id(real[id(fake)])] = fake
        return real[id(fake)]

    def to_fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in fakes:
            fake = mode.from_tensor(tensor.detach().clone())
            fakes[id(tensor)] = fake.requires_grad_(tensor.requires_grad)
            real[id(fake)] = tensor
        return fakes[id(tensor)]

    args, kwargs = swap((args, kwargs), to_real)
    versions = {key: value._version for key, value in real.items()}
    state = torch.get_rng_state()
    watch = _Watch(made)
    try:
        with watch:
            result = run(args, kwargs)
    finally:
        torch.set_rng_state(state)
    touched = {key for key, value in real.items() if id(value) in watch.taken}
    changed = {key for key, seen in versions.items() if real[key]._version != seen}
    result = swap(result, to_fake)
    args, kwargs = swap((args, kwargs), to_fake)
    return ShapeRun(result, args, kwargs, touched, changed, alive=(real, fakes))


class _Watch(TorchDispatchMode):
    """Notes the tensors that operations take, and those that they make."""

    def __init__(self, made: list[torch.Tensor]) -> None:
        super().__init__()
        self.taken: set[int] = set()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken.update(id(t) for t in tensors_in((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        given = {id(t) for t in tensors_in((args, kwargs or {}))}
        self._made += [
            t
            for t in tensors_in(result)
            if t.layout is torch.strided and id(t) not in given and not func.is_view
        ]
        return result
