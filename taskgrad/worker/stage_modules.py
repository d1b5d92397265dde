"""The modules of some layers with their parameters and buffers, found once and kept.

A forward asks several times what its layers consist of, and a walk over all modules of a large one
takes milliseconds. But a layer may register, replace or remove parameters, buffers and submodules
in its forward. So what was found is checked before it is used again: the dictionaries of all
modules must be the same ones, and hold the same objects as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

_WALKS = (
    "_named_members",
    "buffers",
    "modules",
    "named_buffers",
    "named_modules",
    "named_parameters",
    "parameters",
)


@dataclass(frozen=True, eq=False)
class Members:
    """What some layers consist of, each object once.

    `modules` are all of them, the inner ones too; `named` those of the shard's parameters that are
    among the layers'.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    buffers: list[torch.Tensor]
    named: list[tuple[str, nn.Parameter]]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those of the shard's parameters that require grad now."""
        return {name: p for name, p in self.named if p.requires_grad}

    def hold(self, tensor: torch.Tensor) -> bool:
        """True if a strided tensor lies in memory of a parameter or buffer now."""
        address = tensor.untyped_storage().data_ptr()
        if not address:
            return False
        strided = torch.strided
        for t in chain(self.parameters, self.buffers):
            if t.layout is strided and t.untyped_storage().data_ptr() == address:
                return True
        return False


class StageModules:
    """The modules among some layers of a shard, whose lock the caller holds.

    `layers` are those layers that are modules. They stay the same ones, as do the shard's
    parameters by name; all else may change.
    """

    def __init__(self, layers: Iterable[Any], named: Mapping[str, nn.Parameter]) -> None:
        self.layers: list[nn.Module] = [x for x in layers if isinstance(x, nn.Module)]
        self._named = named
        self._members: Members | None = None
        self._contents: list[Any] = []

    def members(self) -> Members:
        """What the layers consist of now; the same object as last time if nothing has changed."""
        members = self._members
        if members is not None:
            contents, known = _contents_of(members.modules), self._contents
            if len(contents) == len(known) and all(map(is_, contents, known)):
                return members
        members = self._walk()
        self._members = None
        if not any(map(_walks_its_own_way, members.modules)):
            self._members = members
            self._contents = _contents_of(members.modules)
        return members

    def _walk(self) -> Members:
        modules = {id(m): m for layer in self.layers for m in layer.modules()}
        parameters = {id(p): p for layer in self.layers for p in layer.parameters()}
        buffers = {id(b): b for layer in self.layers for b in layer.buffers()}
        named = [(name, p) for name, p in self._named.items() if id(p) in parameters]
        return Members([*modules.values()], [*parameters.values()], [*buffers.values()], named)


def _contents_of(modules: list[nn.Module]) -> list[Any]:
    """The dictionaries of these modules, and after each one what it holds."""
    found: list[Any] = []
    append, extend = found.append, found.extend
    for module in modules:
        parameters, buffers, inner = module._parameters, module._buffers, module._modules
        append(parameters)
        extend(parameters.values())
        append(buffers)
        extend(buffers.values())
        append(inner)
        extend(inner.values())
    return found


def _walks_its_own_way(module: nn.Module) -> bool:
    """True if this module may show more or less than its dictionaries hold."""
    return any(
        getattr(getattr(module, name), "__func__", None) is not getattr(nn.Module, name)
        for name in _WALKS
    )
