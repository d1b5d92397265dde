"""Refuse uses of lazy values that would have no effect, or another one than in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from taskgrad.graph.objects import attributes_of

_PLAIN = (torch.Tensor, nn.Module, FunctionType, ModuleType, type, str, bytes, int, float, complex)

_DEPTH = 4
"""How many levels of a value of unknown type are searched."""

# Functions that write to some of their arguments although their names do not end in "_". For each:
# the names and positions of those arguments, and of the one that has to be true for it.
_WRITING = {
    "batch_norm": ({"running_mean": 1, "running_var": 2}, ("training", 5)),
    "instance_norm": ({"running_mean": 1, "running_var": 2}, ("use_input_stats", 5)),
    "embedding": ({"weight": 1}, ("max_norm", 3)),
    "embedding_bag": ({"weight": 1}, ("max_norm", 3)),
}


def refuse_writing(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise TypeError if a torch function of thunks would write to one of its arguments.

    It would run on a worker, later, and write to a copy: in-place operations, functions with an
    ``out=``, updates of running statistics.
    """
    name = getattr(func, "__name__", "")
    setter = name in ("__set__", "__setitem__", "__delitem__")
    inplace = name.endswith("_") and not name.endswith("__")
    inplace |= name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    if setter or inplace:
        shown = {"__setitem__": "x[...] = ", "__set__": "an attribute"}.get(name, name)
        raise TypeError(
            f"{shown} writes to a tensor, and takes a thunk, whose value is not here yet: nothing "
            "would be written. Use what gives a new value (x + thunk, torch.add), or write "
            "tg.collect(thunk)"
        )
    if kwargs.get("out") is not None:
        raise TypeError(
            f"{name} of a thunk runs on a worker, and cannot write to out=. Leave it out, or take "
            "tg.collect(thunk)"
        )
    if kwargs.get("inplace") is True and args and isinstance(args[0], torch.Tensor):
        raise TypeError(
            f"{name} of a thunk runs on a worker, and cannot write to its argument. Leave out "
            "inplace=True, or take tg.collect(thunk)"
        )
    if name == "grad" or name == "backward":
        raise TypeError(
            f"{name} of torch.autograd takes no thunks: thunk.backward(), tg.vjp and tg.collect "
            "are what differentiates them"
        )
    if name in _WRITING:
        written, condition = _WRITING[name]
        given = [_argument(args, kwargs, *at) for at in written.items()]
        if _argument(args, kwargs, *condition) and any(isinstance(x, torch.Tensor) for x in given):
            raise TypeError(
                f"{name} of a thunk runs on a worker, and cannot write to {', '.join(written)} "
                "here. Put a module that does in a tg.GraphChain, or take tg.collect(thunk)"
            )


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, position: int) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def refuse_hidden(tree: Any, leaves: Sequence[Any], kind: type) -> None:
    """Raise TypeError if a tree has lazy values of this kind that are not among its leaves.

    They may be in a set, a key of a dict, a generator, or an attribute of an object.
    """
    for leaf in leaves:
        if leaf is None or isinstance(leaf, (kind, *_PLAIN)):
            continue
        if isinstance(leaf, Iterator):
            raise TypeError(
                f"a {type(leaf).__name__} may give thunks, and is not read: give a list of them"
            )
        if any(isinstance(value, kind) for value in _inside(leaf, _DEPTH)):
            raise TypeError(
                f"a value of type {type(leaf).__name__} holds thunks, which are found in tuples, "
                "lists, dicts and dataclasses only: put them into one of these"
            )
    for key in _keys(tree):
        if isinstance(key, kind):
            raise TypeError("a thunk is a key of a dict, where it stays one: make it a value")


def _inside(value: Any, depth: int) -> Iterator[Any]:
    """An object, what it holds, and what that holds."""
    if value is None or isinstance(value, _PLAIN) or not depth:
        return
    yield value
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, Set | ValuesView | list | tuple):
        parts = [*value]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    else:
        parts = list(attributes_of(value).values())
    for part in parts:
        yield from _inside(part, depth - 1)


def _keys(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        yield from tree
        for value in tree.values():
            yield from _keys(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _keys(value)
