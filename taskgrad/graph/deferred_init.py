"""Deferred initialization: tensors without values, which a worker makes or reads.

A model on torch's `meta` device is shapes only. Its values are made where they will live: by each
module's ``reset_parameters``, from a random stream of the module's own, or read there from files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from taskgrad.formats.conversions import Source
from taskgrad.graph.adapters import Adapters
from taskgrad.graph.class_init import InitCall, Initializers, OnMeta, calls_for, initializers
from taskgrad.graph.layers import Layer, Model, ParameterInfo, kind_of, local_name, owner_of


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides and dtype of a tensor whose values are not sent."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of this tensor, or of a dense one where it is a view."""
        like = torch.empty_like(tensor, device="meta")
        return cls(tuple(like.shape), like.stride(), like.dtype)

    def empty(self, device: torch.device) -> torch.Tensor:
        """Allocate the tensor filled with NaN, so that values left unset are detected."""
        found = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return found.fill_(torch.nan) if found.is_floating_point() else found.zero_()


class Reset(NamedTuple):
    """A module that sets its own values: its name in its layer, and its name in the model.

    The latter is that of its random stream. `adapters` are those of a LoRA layer to set.
    """

    inner: str
    name: str
    adapters: tuple[tuple[str, Any], ...] = ()


@dataclass
class InitPlan:
    """How a layer's unsent tensors get their values, in this order.

    Attributes
    ----------
    resets
        The modules inside it that set their values.
    calls
        The calls of ``_init_weights`` of the model's class, with `roots`, the objects that have it.
    reads
        What is read from files, by its name in the layer.
    equal
        What the files have for a tied tensor under its other names, which has to be the same.
    unsent
        The names in the layer of all these tensors.
    """

    resets: list[Reset] = field(default_factory=list)
    calls: list[InitCall] = field(default_factory=list)
    roots: list[OnMeta] = field(default_factory=list)
    reads: dict[str, Source] = field(default_factory=dict)
    equal: dict[str, list[Source]] = field(default_factory=dict)
    unsent: list[str] = field(default_factory=list)

    @property
    def does_something(self) -> bool:
        """True if there are tensors that are not sent, or a module sets what was sent."""
        return bool(self.unsent or self.resets or self.calls)


class DeferredInit(NamedTuple):
    """By layer how its unsent tensors get their values; by the id of others what is sent."""

    plans: Mapping[int, InitPlan]
    values: Mapping[int, torch.Tensor]


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """The method with which a module sets its own values; attention's has an underscore."""
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def unsent_names(flat: Model, stored: Mapping[str, Source] | None) -> list[str]:
    """The first names of tensors whose values are not sent: meta ones, and those in files."""
    return [
        name
        for name, info in flat.tensors.items()
        if info.device.type == "meta" or any(n in (stored or ()) for n in info.names)
    ]


def unsent_tensors(flat: Model, init_plans: Mapping[int, InitPlan]) -> set[int]:
    """The ids of the tensors whose values are not sent."""
    found = set()
    for index, plan in init_plans.items():
        module = flat.modules[index]
        assert isinstance(module, nn.Module)
        named = named_tensors(module)
        found |= {id(named[name]) for name in plan.unsent}
    return found


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    named: dict[str, torch.Tensor] = dict(module.named_buffers(remove_duplicate=False))
    return named | dict(module.named_parameters(remove_duplicate=False))


def plan_init(
    model: nn.Module,
    flat: Model,
    stored: Mapping[str, Source] | None,
    constructed: Callable[[list[ParameterInfo]], Mapping[str, torch.Tensor]],
) -> DeferredInit:
    """How the tensors that are not sent get their values.

    `constructed` returns the values that the constructors of modules compute, of those of these
    tensors of which it can.

    Raises ValueError if a module cannot make its own values.
    """
    by_name = {layer.name: layer for layer in reversed(flat.layers)}
    found: dict[int, InitPlan] = {}
    to_make: dict[str, list[str]] = {}  # names of tensors, by their modules'
    making: dict[int, str] = {}
    ours = named_tensors(model)
    for first in unsent_names(flat, stored):
        info = flat.tensors[first]
        in_file = [stored[n] for n in info.names if stored and n in stored]
        for name in info.names:
            layer = owner_of(name, by_name)
            plan = found.setdefault(layer.index, InitPlan())
            plan.unsent.append(local_name(name, layer))
            if in_file:
                plan.reads[local_name(name, layer)] = in_file[0]
            else:
                to_make.setdefault(name.rpartition(".")[0], []).append(name)
        if in_file:
            others = [other for other in in_file[1:] if other != in_file[0]]
            layer = owner_of(first, by_name)
            if others:
                found[layer.index].equal[local_name(first, layer)] = others
        else:
            making[id(ours[first])] = first
    inits = initializers(model, making)
    adapters = Adapters.of(model)
    wanted: dict[str, str] = {}
    for owner, names in to_make.items():
        part = model.get_submodule(owner)
        if adapters.has(owner):
            resets = adapters.sets(owner)
        else:
            resets = reset_of(part) is not None
        own_class = type(part).__module__.split(".")[0] != "torch"
        for name in names:
            first = making[id(ours[name])]
            if first != name or (first in inits.writers and not adapters.has(owner)):
                continue
            whole = not ours[name].is_floating_point()  # has no NaN to find it unset by
            if not resets or (whole and own_class):
                wanted[first] = owner
    values = constructed([flat.tensors[name] for name in wanted])
    for name, owner in wanted.items():
        part = model.get_submodule(owner)
        if name not in values and (reset_of(part) is None or adapters.has(owner)):
            lacking = [n for n in to_make[owner] if n in wanted and n not in values]
            raise ValueError(_no_reset(owner, part, lacking, stored is not None))
    for name in values:
        for alias in flat.tensors[name].names:
            layer = owner_of(alias, by_name)
            found[layer.index].unsent.remove(local_name(alias, layer))
    for layer, module in zip(flat.layers, flat.modules, strict=True):
        if layer.index in found and isinstance(module, nn.Module):
            plan = found[layer.index]
            _plan_layer(plan, model, layer, module, to_make, making, inits, adapters)
    by_id = {id(ours[name]): value for name, value in values.items()}
    return DeferredInit({i: plan for i, plan in found.items() if plan.does_something}, by_id)


def _plan_layer(
    plan: InitPlan,
    model: nn.Module,
    layer: Layer,
    module: nn.Module,
    to_make: Mapping[str, list[str]],
    making: Mapping[int, str],
    inits: Initializers,
    adapters: Adapters,
) -> None:
    """Add to a layer's plan how the tensors in `to_make` are made that are part of it."""
    roots: dict[str, int] = {}
    # Inner modules first: an outer one may overwrite their values. A tied tensor keeps the values
    # of the module that has it first.
    parts = reversed(list(module.named_modules(remove_duplicate=False)))
    for inner, part in parts:
        owner = ".".join(filter(None, (layer.name, inner)))
        if owner in adapters.lora and any(adapters.sets(name, owner) for name in to_make):
            plan.resets.append(Reset(inner, owner, adapters.lora[owner]))
        if owner not in to_make:
            continue
        own = model.get_submodule(owner)
        firsts = [n for n in to_make[owner] if n in making.values()]
        local = [n.rpartition(".")[2] for n in firsts]
        if layer.holds:
            if reset_of(own) is not None:
                call = InitCall(inner, tuple(local), owner, None, OnMeta.of(own), "")
                plan.calls.append(call)
        elif reset_of(part) is not None:
            plan.resets.append(Reset(inner, owner))
        if not adapters.has(owner):
            plan.calls += calls_for(inits, owner, inner, local, roots)
    plan.roots = [inits.root(name) for name in roots]


def _no_reset(name: str, module: nn.Module, tensors: list[str], files: bool) -> str:
    of_files = "and is no part of what files hold, " if files else ""
    return (
        f"{', '.join(map(repr, tensors))} of module {name!r} ({kind_of(module)}) is on the meta "
        f"device {of_files}and the module has no reset_parameters() that gives it values on its "
        "worker. Write one (it also makes what the module computes in its __init__), "
        + ("or make the module on a real device" if files else "or give weights=")
    )
