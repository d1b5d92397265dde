"""Check that the layers of a model can be sent to workers, before anything is sent."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.graph.layers import Model
from taskgrad.graph.parameter_extras import has_hooks, named_extras


def reached(flat: Model) -> list[list[torch.Tensor]]:
    """The tensors that are sent with each layer: its own, and others that it refers to.

    Raises TypeError if a layer cannot be pickled. The message names it and, if the cause is an
    attribute or a hook of one of its tensors, that too.
    """
    found = []
    for layer, module in zip(flat.layers, flat.modules, strict=True):
        where = f"layer {layer.name!r} ({layer.kind})"
        if isinstance(module, nn.Module):
            _check_parts(module, where, layer.name)
        packed = pack.pickle_or_explain(
            functools.partial(pack.pack, module, hooks=True),
            where,
            ". Take what cannot be pickled (locks, open files, generators) out of it, or make it "
            "in forward()",
            culprit=functools.partial(unpicklable_extra, [(layer.name, module)], hooks=True),
        )
        found.append(packed.tensors)
    return found


def _check_parts(module: nn.Module, where: str, prefix: str) -> None:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise TypeError(
            f"{where} cannot be sent to a worker, because it is or holds a torch.jit.ScriptModule, "
            "which cannot be pickled: give the module that it was made from"
        )
    for name, tensor in _named(prefix, module):
        if has_hooks(tensor) and not pack.is_plain(tensor):
            raise TypeError(
                f"{where} cannot be sent to a worker with the hooks on its parameter {name!r}: "
                f"hooks travel with dense parameters, and this is a {type(tensor).__name__} of "
                f"layout {tensor.layout}. Take the hooks off before the chain is made"
            )
    for part in module.modules():
        if part._forward_pre_hooks:  # as of weight norm, which computes such attributes anew
            continue
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                raise TypeError(
                    f"{where} cannot be sent to a worker, because the attribute {name!r} of a "
                    f"{type(part).__name__} was computed from other tensors: on the worker no "
                    "gradient would reach those. Compute it in forward(), or detach() it"
                )


def unpicklable_extra(named: Iterable[tuple[str, Any]], *, hooks: bool) -> str | None:
    """Which attribute or hook of the tensors of modules cannot be pickled; None if all can.

    The modules come with their names in the model.
    """
    for prefix, module in named:
        for name, tensor in _named(prefix, module):
            for what, part in named_extras(tensor, hooks=hooks):
                try:
                    pack.pack(part)
                except Exception:
                    return f"{what} of {name!r}"
    return None


def _named(prefix: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(module, nn.Module):
        yield from module.named_parameters(prefix)
        yield from module.named_buffers(prefix)


def refuse_cached(title: str) -> None:
    """Raise TaskgradError if a parametrized module is called within ``parametrize.cached()``."""
    if parametrize._cache_enabled:
        raise TaskgradError(
            f"{title!r} has parametrizations, and parametrize.cached() holds for this process and "
            "not for the workers, where they run. Use it in the forward of a module"
        )


def is_parametrized(modules: Iterable[Any]) -> bool:
    """True if any of these modules, or a part of one, has parametrizations."""
    parts = (p for m in modules if isinstance(m, nn.Module) for p in m.modules())
    return any(pack.parametrized_names(part) for part in parts)
