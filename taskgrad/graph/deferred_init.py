"""Deferred initialization: tensors without values, which a worker makes or reads.

A model on torch's `meta` device is shapes only. Its values are made where they will live: by each
module's ``reset_parameters``, from a random stream of the module's own, or read there from files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.errors import CheckpointError
from taskgrad.formats.weights import Stored
from taskgrad.graph.layers import Model, kind_of, local_name, owner_of


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


@dataclass
class InitPlan:
    """How a layer's unsent tensors get their values.

    `resets` are the modules inside it that make them, in this order, each with its full name, which
    its random stream is named after; `reads` are then read from files, by their names in the layer.
    """

    resets: list[tuple[str, str]] = field(default_factory=list)
    reads: dict[str, Stored] = field(default_factory=dict)
    unsent: list[str] = field(default_factory=list)


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """The method with which a module sets its own values; attention's has an underscore."""
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def unsent_names(flat: Model, stored: Mapping[str, Stored] | None) -> set[str]:
    """The first names of tensors whose values are not sent: meta ones, and those in files."""
    return {
        name
        for name, info in flat.tensors.items()
        if info.device.type == "meta" or (stored is not None and info.persistent)
    }


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


def from_factory(model: Any) -> Any:
    """The module that a function makes, without values; a module as it is.

    Raises TypeError if the function takes arguments, or does not return a module.
    """
    if isinstance(model, nn.Module) or not callable(model):
        return model
    try:
        with torch.device("meta"):
            made = model()
    except TypeError as error:
        raise TypeError(
            "GraphChain takes an nn.Module, or a function without arguments that makes one; got "
            f"{kind_of(model)}, which raised: {error}. For a function of tensors use "
            "tg.spawn(fn, ...)."
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(
            "GraphChain takes an nn.Module, or a function that makes one; got "
            f"{kind_of(model)}, which gave a {type(made).__name__}"
        )
    return made


def plan_init(flat: Model, stored: Mapping[str, Stored] | None) -> dict[int, InitPlan]:
    """For each layer with unsent tensors, how they get their values.

    Raises CheckpointError if the files lack tensors of the model, or have others, or of another
    shape; ValueError if a module cannot make its own values.
    """
    if stored is not None:
        _check(flat, stored)
    by_name = {layer.name: layer for layer in reversed(flat.layers)}
    found: dict[int, InitPlan] = {}
    to_reset: dict[str, list[str]] = {}
    for first in unsent_names(flat, stored):
        info = flat.tensors[first]
        in_file = next((n for n in info.names if stored and n in stored), None)
        for name in info.names:
            layer = owner_of(name, by_name)
            plan = found.setdefault(layer.index, InitPlan())
            plan.unsent.append(local_name(name, layer))
            if stored is not None and in_file is not None:
                plan.reads[local_name(name, layer)] = stored[in_file]
            else:
                to_reset.setdefault(name.rpartition(".")[0], []).append(name)
    for layer, module in zip(flat.layers, flat.modules, strict=True):
        if layer.index not in found or not isinstance(module, nn.Module):
            continue
        # Inner modules first: an outer one may overwrite their values. A tied tensor keeps the
        # values of the module that has it first.
        for inner, part in reversed(list(module.named_modules(remove_duplicate=False))):
            full = ".".join(filter(None, (layer.name, inner)))
            if full not in to_reset:
                continue
            if reset_of(part) is None:
                raise ValueError(_no_reset(full, part, to_reset[full], stored is not None))
            found[layer.index].resets.append((inner, full))
    return found


def _no_reset(name: str, module: nn.Module, tensors: list[str], files: bool) -> str:
    of_files = "and is no part of what files hold, " if files else ""
    return (
        f"{', '.join(map(repr, tensors))} of module {name!r} ({kind_of(module)}) is on the meta "
        f"device {of_files}and the module has no reset_parameters() that gives it values on its "
        "worker. Write one (it also makes what the module computes in its __init__), "
        + ("or make the module on a real device" if files else "or give weights=")
    )


def _check(flat: Model, stored: Mapping[str, Stored]) -> None:
    expected = {n: info for info in flat.tensors.values() if info.persistent for n in info.names}
    missing = [
        name
        for name, info in flat.tensors.items()
        if info.persistent and not any(n in stored for n in info.names)
    ]
    unexpected = [name for name in stored if name not in expected]
    wrong = [
        f"{name}: the model has {list(info.shape)}, the file has {list(stored[name].shape)}"
        for name, info in expected.items()
        if name in stored and stored[name].shape != info.shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"the weights do not fit this model. Missing: {missing or 'none'}. Unexpected: "
            f"{unexpected or 'none'}. Wrong shape: {wrong or 'none'}"
        )
