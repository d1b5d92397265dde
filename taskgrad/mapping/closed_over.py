"""The tensors that a mapped function closes over: found, and packed apart from the function."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from taskgrad.graph import pack
from taskgrad.graph.functions import PackedFunction, pack_function
from taskgrad.graph.layers import kind_of
from taskgrad.thunk import Lazy, Thunk

# Objects of these packages hold no tensor of the user's.
_LIBRARIES = frozenset(
    {"torch", "numpy", "scipy", "dask", "distributed", "taskgrad", "cloudpickle"}
)
_ATOMS = (bool, int, float, complex, str, bytes, type, types.ModuleType, type(None))


def title_of(fn: Callable[..., Any]) -> str:
    """The function's name, for keys and messages."""
    return kind_of(fn).strip("<>")


def pack_mapped(fn: Callable[..., Any]) -> PackedFunction:
    """Pack a function, to be sent to workers.

    Raises TypeError if it cannot be pickled, or holds what cannot be differentiated there: a thunk
    or chain, a tensor of a kind that is pickled in a way of its own, or a global of a module that
    workers import for themselves.
    """
    title = title_of(fn)
    found = closed_over_tensors(fn)
    for part in _reachable(fn):
        if isinstance(part, Lazy | Thunk):
            raise TypeError(
                f"{title!r} closes over a {type(part).__name__}, which belongs to this driver and "
                "cannot be used on a worker. Give the map an nn.Module (chain.to_module()) or "
                'tensors (tg.collect(thunk)), or use over="threads"'
            )
    for tensor in found:
        if not pack.is_plain(tensor):
            raise TypeError(
                f"{title!r} closes over a {type(tensor).__name__} of layout {tensor.layout} that "
                "requires grad; a map over processes differentiates dense tensors and parameters. "
                'Give it as an item, detach it, or use over="threads"'
            )
    packed = pack_function(fn, title, advice=', or use over="threads"')
    sent = {id(t) for t in packed.tensors}
    if any(id(t) not in sent for t in found):
        raise TypeError(
            f"{title!r} uses a global of a module that every worker imports for itself, with a "
            "tensor in it that requires grad: no gradient would come back to yours. Give it to "
            "the function as an argument (functools.partial), or define the function where the "
            "global is local"
        )
    return packed


def closed_over_tensors(fn: Callable[..., Any]) -> list[torch.Tensor]:
    """The tensors that require grad and that a function can reach, each once.

    Through closures, default arguments, partials, bound methods, modules and other objects,
    containers, and the globals that its code names; not through code of libraries.
    """
    return [t for t in _reachable(fn) if isinstance(t, torch.Tensor) and t.requires_grad]


def _reachable(fn: Callable[..., Any]) -> Iterator[Any]:
    """The tensors, chains and thunks that a function can reach."""
    seen: dict[int, Any] = {}
    stack: list[Any] = [fn]
    while stack:
        part = stack.pop()
        if isinstance(part, _ATOMS) or id(part) in seen:
            continue
        seen[id(part)] = part  # held, so that no other object gets its identity
        if isinstance(part, torch.Tensor | Lazy | Thunk):
            yield part
        else:
            stack.extend(_parts(part))


def _parts(part: Any) -> Iterator[Any]:
    """What an object holds."""
    if isinstance(part, functools.partial):
        yield from (part.func, *part.args, *part.keywords.values())
    elif isinstance(part, types.MethodType):
        yield from (part.__self__, part.__func__)
    elif isinstance(part, types.FunctionType):
        if not _is_library(part):
            yield from _parts_of_function(part)
    elif isinstance(part, dict):
        yield from part.values()
    elif isinstance(part, list | tuple | set | frozenset):
        yield from part
    elif isinstance(part, nn.Module) or not _is_library(type(part)):
        yield from vars(part).values() if hasattr(part, "__dict__") else ()
        if not _is_library(type(part)):
            yield from (f for f in vars(type(part)).values() if isinstance(f, types.FunctionType))


def _parts_of_function(fn: types.FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    yield from vars(fn).values()
    for name in _names(fn.__code__):
        if name in fn.__globals__:
            yield fn.__globals__[name]


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that some code, and the functions in it, look up outside of themselves."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(thing: Any) -> bool:
    root = (getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")
