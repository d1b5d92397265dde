"""A model without values, whose forward can be followed on the driver.

Its tensors are torch's fake ones: they have shapes, and take no memory. Its modules are of classes
that tell what follows them when they are called; to the model's own code they look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from taskgrad.graph import pack
from taskgrad.graph.deferred_init import TensorSpec


class Follower(Protocol):
    """What stand-ins tell of their calls."""

    paused: bool
    """True while calls are to run as they are."""

    def layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer is called."""

    def inside(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        """The forward of a module that is cut begins; `run` runs it."""


follower: ContextVar[Follower | None] = ContextVar("taskgrad_follower", default=None)
"""What follows the forward that runs in this thread, if any."""


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model whose parameters and buffers are fake.

    Other tensors that it has keep their values: a forward may compute with them.
    """
    made: dict[int, torch.Tensor] = {}
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def persist(part: Any) -> Any:
        if not pack.is_plain(part):
            return None
        known = not (id(part) in own or part.is_meta or part.requires_grad)
        if id(part) not in made and known:
            made[id(part)] = part.detach().clone()
        elif id(part) not in made:
            spec = TensorSpec.of(part)
            with mode:
                fake = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
                if isinstance(part, nn.Parameter):
                    fake = nn.Parameter(fake, part.requires_grad)
            made[id(part)] = fake
        return id(part)

    data = pack.dumps(model, persist)
    found: nn.Module = pack.loads(data, made.__getitem__)
    return found


def run_with_values(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module of a copy with values of no meaning in the place of its own tensors."""
    made: dict[int, torch.Tensor] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for _, tensor in named:
        if id(tensor) not in made:
            made[id(tensor)] = meaningless(tensor).requires_grad_(tensor.requires_grad)
    values = {name: made[id(tensor)] for name, tensor in named}
    before = [(vars(m), dict(vars(m))) for m in module.modules()]
    try:
        return torch.func.functional_call(module, values, args, kwargs, tie_weights=False)
    finally:
        for attributes, was in before:
            attributes.clear()
            attributes.update(was)


def meaningless(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one, with values: halves, zeros or True."""
    value = 0.5 if tensor.is_floating_point() or tensor.is_complex() else 0
    full = torch.full(tuple(tensor.shape), value, dtype=torch.float32)
    return (
        torch.ones_like(full, dtype=torch.bool)
        if tensor.dtype is torch.bool
        else full.to(tensor.dtype)
    )


def stand_in(module: nn.Module, *, is_layer: bool) -> None:
    """Let calls of a module go to what follows them."""
    make: Any = _layer_class if is_layer else _opened_class
    module.__class__ = make(type(module))


@cache
def _layer_class(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        following = follower.get()
        if following is None or following.paused:
            return kind.__call__(self, *args, **kwargs)
        return following.layer(self, args, kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        following = follower.get()
        if following is None or following.paused:
            return kind.forward(self, *args, **kwargs)
        return following.layer(self, args, kwargs)

    return _named_as(kind, {"__call__": call, "forward": forward})


@cache
def _opened_class(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        following = follower.get()
        if following is None or following.paused:
            return kind.__call__(self, *args, **kwargs)
        return following.inside(self, lambda: kind.__call__(self, *args, **kwargs))

    return _named_as(kind, {"__call__": call})


def _named_as(kind: type[nn.Module], methods: Mapping[str, Any]) -> type[nn.Module]:
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_taskgrad_class": kind,
    }
    metaclass: Any = type(kind)
    made: type[nn.Module] = metaclass(kind.__name__, (kind,), {**names, **methods})
    return made


@dataclass(frozen=True)
class Parts:
    """What a followed model consists of, its stand-ins.

    Attributes
    ----------
    layers
        The index and name of each layer, by the id of the module.
    opened
        The name of each module that is cut, by its id.
    tensors
        Of each fake parameter and buffer, by its id: layer's index, name there, full name, whether
        it is a buffer.
    hooks
        For each layer, by its id, the keys of the hooks that it came with: these run on its worker.
    mode
        Of the fake tensors.
    unknown_shapes
        The classes of layers of which the shapes cannot be inferred.
    """

    layers: Mapping[int, tuple[int, str]]
    opened: Mapping[int, str]
    tensors: Mapping[int, tuple[int, str, str, bool]]
    hooks: Mapping[int, frozenset[int]]
    mode: FakeTensorMode
    unknown_shapes: set[type] = field(default_factory=set)
