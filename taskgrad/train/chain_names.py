"""The names by which a function knows the chains and modules that it calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from taskgrad.chain import GraphChain

_DEPTH = 3  # of attributes and containers in each other
_MOST = 1000  # elements of a container that is looked into


Named = dict[int, tuple[str, GraphChain | nn.Module]]
"""Chains and modules with their names, by the id of a chain's layout or of a module."""


def named_in(function: Callable[..., Any]) -> Named:
    """The chains and modules that a function reaches, each with the first name that it has there.

    These are attributes of the object of a method, or of a callable object; then the variables that
    it closes over, arguments with defaults and those of a ``functools.partial``, and the globals
    that it uses; then the same of functions of its own package among these. What is in a list, a
    dictionary or an attribute has the name of that before its own: ``blocks.0``.
    """
    found: Named = {}
    for name, value in _variables(function, set()):
        _add(name, value, found, _DEPTH)
    return found


def _add(name: str, value: Any, found: Named, depth: int) -> None:
    if isinstance(value, GraphChain):
        found.setdefault(id(value.layout), (name, value))
    if isinstance(value, nn.Module):
        for inner, module in value.named_modules():
            found.setdefault(id(module), (".".join(filter(None, (name, inner))), module))
    if depth:
        for key, part in _inside(value).items():
            if isinstance(key, str | int):
                _add(".".join(filter(None, (name, str(key)))), part, found, depth - 1)


def _inside(value: Any) -> Mapping[Any, Any]:
    """What may be a chain in this value, by its name there."""
    if isinstance(value, GraphChain | type | ModuleType):
        return {}
    if isinstance(value, nn.Module):
        return {k: v for k, v in vars(value).items() if isinstance(v, GraphChain)}
    if isinstance(value, Mapping):
        return value if len(value) <= _MOST else {}
    if isinstance(value, list | tuple):
        return dict(enumerate(value)) if len(value) <= _MOST else {}
    return getattr(value, "__dict__", {})


def _variables(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a function refers to, by name."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        bound = inspect.signature(function.func).bind_partial(*function.args, **function.keywords)
        yield from bound.arguments.items()
        yield from _variables(function.func, seen)
        return
    if inspect.ismethod(function):
        yield "", _attributes(function.__self__)
        yield from _variables(function.__func__, seen)
        return
    if not inspect.isfunction(function):
        yield "", _attributes(function)
        method = function.forward if isinstance(function, nn.Module) else type(function).__call__
        yield from _variables(getattr(method, "__func__", method), seen)
        return
    used = [*_closed_over(function), *_defaults(function), *_globals(function)]
    yield from used
    package = function.__module__.partition(".")[0]
    for _, value in used:
        own = getattr(value, "__module__", None) or ""
        if inspect.isroutine(value) and own.partition(".")[0] == package:
            yield from _variables(value, seen)


def _attributes(owner: Any) -> dict[str, Any]:
    if isinstance(owner, nn.Module):
        return {**dict(owner.named_children()), **vars(owner)}
    return dict(getattr(owner, "__dict__", {}))


def _closed_over(function: Any) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _defaults(function: Any) -> Iterator[tuple[str, Any]]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            yield parameter.name, parameter.default


def _globals(function: Any) -> Iterator[tuple[str, Any]]:
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _global_names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, and that of functions in it, may take from globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
