"""Pickle modules with parametrizations.

``torch.nn.utils.parametrize`` gives each of these modules a new class, which refuses to be pickled.
The class only adds properties, which can be made again from the names of the parametrized tensors.
The tensors behind the properties are ordinary parameters and buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def parametrized_names(module: nn.Module) -> list[str]:
    """The tensors of a module itself, not of its parts, that have parametrizations."""
    # `parametrize.is_parametrized` is also true of a compiled wrapper of such a module.
    refuses = vars(type(module)).get("__getstate__")
    if getattr(refuses, "__module__", None) != parametrize.__name__:
        return []
    found = module._modules["parametrizations"]
    return list(found) if isinstance(found, nn.ModuleDict) else []


def reduce_module(module: nn.Module) -> Any:
    """A parametrized module as pickle's (function, arguments, state); others NotImplemented."""
    names = parametrized_names(module)
    if not names:
        return NotImplemented
    kind: Any = parametrize.type_before_parametrizations(module)
    if (kind.__reduce__, kind.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        return NotImplemented
    return _bare, (kind, names), kind.__getstate__(module)


def _bare(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """A module without state, of a class as `register_parametrization` makes it."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name in names:
        made.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(made, name, nn.Identity(), unsafe=True)
    vars(made).clear()
    return made
