"""Put other tensors in the place of those in a value, where they are: in place, but for tuples."""

from __future__ import annotations

import types
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

_ENDS = (
    *(str, bytes, int, float, complex, type(None), type, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, types.MethodType, nn.Module, torch.Generator, torch.dtype),
)


def swap(value: Any, new: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with `new` of each tensor in its place.

    Lists, dictionaries and attributes of objects are written; tuples are made anew.
    """
    return _swap(value, new, {})


def contents(value: Any) -> list[tuple[Any, Any]]:
    """All that `swap` would write in a value, each with a copy of what is in it now."""
    found: dict[int, tuple[Any, Any]] = {}

    def walk(part: Any) -> None:
        if isinstance(part, (torch.Tensor, *_ENDS)) or id(part) in found:
            return
        attributes = getattr(part, "__dict__", None)
        if isinstance(part, list | dict):
            found[id(part)] = part, part.copy() if type(part) in (list, dict) else copy(part)
        if isinstance(part, list | tuple):
            inner = list(part)
        else:
            inner = list(part.values()) if isinstance(part, dict) else []
        if isinstance(attributes, dict):
            found[id(attributes)] = attributes, dict(attributes)
            inner += list(attributes.values())
        for each in inner:
            walk(each)

    walk(value)
    return list(found.values())


def restore(before: list[tuple[Any, Any]]) -> None:
    """Undo what was written since `contents`."""
    for part, was in before:
        if isinstance(part, list):
            part[:] = was
        else:
            dict.clear(part)
            dict.update(part, was)


def _swap(value: Any, new: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return new(value)
    if isinstance(value, _ENDS):
        return value
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, tuple):
        parts = [_swap(part, new, seen) for part in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            found = value
        elif _pytree.is_namedtuple_class(type(value)):
            found = tuple.__new__(type(value), parts)
        else:
            found = type(value)(parts) if type(value) is not tuple else tuple(parts)
        seen[id(value)] = found
        return found
    seen[id(value)] = value
    if isinstance(value, list):
        for i, part in enumerate(value):
            other = _swap(part, new, seen)
            if other is not part:
                value[i] = other
    elif isinstance(value, dict):
        for key, part in list(value.items()):
            other = _swap(part, new, seen)
            if other is not part:
                dict.__setitem__(value, key, other)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for key, part in list(attributes.items()):
            other = _swap(part, new, seen)
            if other is not part:
                attributes[key] = other
    return value
