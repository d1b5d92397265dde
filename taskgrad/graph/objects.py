"""Split objects that are not containers into the tensors that they hold and the rest.

An object holds what its pickle holds. The rest is kept as that pickle, with persistent ids in place
of tensors, arrays and lazy values. Unpickling it with other values in these places rebuilds the
object; several references to one tensor, and cycles, are preserved.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy as is_uninitialized

from taskgrad.errors import TravelError
from taskgrad.graph import pack

_REGISTER = (
    "Give a tuple, a dict or a dataclass of its tensors instead, or register the type with "
    "torch.utils._pytree.register_pytree_node, in the module that defines it"
)


class Opaque:
    """Base of classes whose instances are always leaves."""

    __slots__ = ()


def is_lazy(value: Any) -> bool:
    """True if this is a value that is not computed yet: a Dask collection or a graph node."""
    return isinstance(value, Opaque) or hasattr(type(value), "__dask_graph__")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """An object without its leaves.

    Attributes
    ----------
    kind
        The name of its type, as not all types can be sent.
    data
        Its pickle.
    types
        The classes that the pickle refers to, by position.
    places
        Where each leaf is in it: ``.features``, ``.states[0]``.
    parameters
        For a leaf that was a Parameter, whether that required grad.
    """

    kind: str
    data: bytes
    types: tuple[type, ...]
    places: tuple[str, ...]
    parameters: Mapping[int, bool]

    def __eq__(self, other: object) -> bool:
        """True if both have the same leaves in the same places; the rest may differ."""
        if not isinstance(other, Skeleton):
            return NotImplemented
        return self.kind == other.kind and self.places == other.places

    def __hash__(self) -> int:
        return hash((self.kind, self.places))


def open_object(value: Any, holds: Callable[[Any], bool]) -> tuple[list[Any], Skeleton] | None:
    """An object's leaves and the rest of it; None if `holds` is true of none of its leaves.

    Raises TravelError if it has a tensor that requires grad and cannot be pickled, or its pickle
    leaves the tensor out; or if it has several of them in a set, which has no order.
    """
    leaves: list[Any] = []
    index: dict[int, int] = {}
    classes: dict[type, int] = {}
    kinds: set[type] = set()

    def persist(part: Any) -> Any:
        if isinstance(part, type):
            return "type", classes.setdefault(part, len(classes))
        kinds.add(type(part))
        if not _is_leaf(part):
            return None
        if id(part) not in index:
            index[id(part)] = len(leaves)
            leaves.append(part)
        return "leaf", index[id(part)]

    try:
        data = pack.dumps(value, persist)
    except Exception as error:
        place = next((p for p, t in _tensors_in(value) if t.requires_grad and holds(t)), None)
        if place is None:
            return None
        raise TravelError(
            f"a {_name(value)} holds a tensor that requires grad ({place}), and cannot be pickled "
            f"({type(error).__name__}: {error}): no gradient could flow through it. {_REGISTER}"
        ) from error
    if not leaves and not any(map(pickles_its_own_way, kinds)):
        return None
    places: dict[int, str] = {}
    for place, tensor in _tensors_in(value):
        places.setdefault(id(tensor), place)
        if tensor.requires_grad and id(tensor) not in index and holds(tensor):
            raise TravelError(
                f"a {_name(value)} holds a tensor that requires grad ({place}) which its pickle "
                f"leaves out: no gradient could flow through it. {_REGISTER}"
            )
    if not any(map(holds, leaves)):
        return None
    named = tuple(places.get(id(leaf), f"leaf {i}") for i, leaf in enumerate(leaves))
    loose = [
        place
        for place, leaf in zip(named, leaves, strict=True)
        if _IN_A_SET in place and isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    if len(loose) > 1:
        raise TravelError(
            f"a {_name(value)} has {len(loose)} tensors that require grad in a set, where they "
            "have no order by which to find them on another worker. Use a list"
        )
    parameters = {
        i: leaf.requires_grad for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Parameter)
    }
    return leaves, Skeleton(_name(value), data, tuple(classes), named, parameters)


def close_object(skeleton: Skeleton, leaves: Sequence[Any]) -> Any:
    """The object again, with these leaves.

    Where there was a Parameter, a plain tensor without autograd history becomes one.
    """
    given = list(leaves)
    for i, requires_grad in skeleton.parameters.items():
        leaf = given[i]
        if type(leaf) is torch.Tensor and not leaf.requires_grad:
            given[i] = nn.Parameter(leaf, requires_grad)

    def load(pid: tuple[str, int]) -> Any:
        kind, i = pid
        return skeleton.types[i] if kind == "type" else given[i]

    return pack.loads(skeleton.data, load)


def at_places(value: Any, skeleton: Skeleton) -> list[Any]:
    """The values that another object has in the places of this one's leaves.

    Raises ValueError if it is of another type, or lacks one of these places.
    """
    if _name(value) != skeleton.kind:
        raise ValueError(f"expected a {skeleton.kind}, got a {_name(value)}")
    found: dict[str, Any] = dict(_walk(value))
    for place in skeleton.places:
        if place not in found:
            raise ValueError(f"this {skeleton.kind} has nothing at {place}")
    return [found[place] for place in skeleton.places]


def _is_leaf(part: Any) -> bool:
    if isinstance(part, torch.Tensor):
        return not is_uninitialized(part)
    if type(part) is np.ndarray:
        return not part.dtype.hasobject
    return is_lazy(part)


def pickles_its_own_way(kind: type) -> bool:
    """True if a class defines how it is pickled, and so may leave parts out."""
    if kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    return any(
        getattr(kind, name, None) is not getattr(object, name, None)
        for name in ("__reduce_ex__", "__reduce__", "__getstate__")
    )


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its ``__dict__`` and its slots."""
    return {**slots_of(value), **getattr(value, "__dict__", {})}


def slots_of(value: Any) -> dict[str, Any]:
    """The values in the slots of an object, by attribute name."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.setdefault(name, getattr(value, name))
    return found


_IN_A_SET = "{?"
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
# Objects that are not searched: what they refer to is not part of a value.
_ENDS = (
    *(type, types.ModuleType, types.CodeType, types.FrameType, types.BuiltinFunctionType),
    *(Opaque, logging.Logger),
)


def _tensors_in(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((place, part) for place, part in _walk(value) if isinstance(part, torch.Tensor))


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """All that an object holds, each once, with its place in the object."""
    seen: dict[int, Any] = {}
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        place, part = stack.pop()
        if isinstance(part, _SIMPLE):
            yield place, part
        elif isinstance(part, _ENDS) or id(part) in seen:
            continue
        else:
            seen[id(part)] = part  # a reference, so that its id is not reused
            yield place, part
            if not isinstance(part, torch.Tensor):
                stack.extend(reversed([(place + at, inner) for at, inner in _parts(part)]))


def _parts(part: Any) -> Iterator[tuple[str, Any]]:
    """The values that an object holds, each with its place there."""
    if isinstance(part, dict | types.MappingProxyType):
        for i, (key, inner) in enumerate(part.items()):
            plain = isinstance(key, str | int)
            yield f"[{key!r}]" if plain else f"[{i}]", inner
            if not plain:
                yield f"[key {i}]", key
    elif isinstance(part, list | tuple | deque):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(part))
    elif isinstance(part, set | frozenset | KeysView | ValuesView | ItemsView):
        loose = isinstance(part, set | frozenset) and len(part) > 1
        yield from ((f"{_IN_A_SET if loose else '{'}{i}}}", inner) for i, inner in enumerate(part))
    elif isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            yield from ((f"[{i}]", inner) for i, inner in enumerate(part.flat))
    elif isinstance(part, weakref.ref):
        yield "()", part()
    elif isinstance(part, functools.partial):
        yield ".func", part.func
        yield from ((f".args[{i}]", inner) for i, inner in enumerate(part.args))
        yield from ((f".keywords[{key!r}]", inner) for key, inner in part.keywords.items())
    elif isinstance(part, types.MethodType):
        yield ".__self__", part.__self__
        yield ".__func__", part.__func__
    elif isinstance(part, types.FunctionType):
        if not _is_importable(part):
            yield from _parts_of_function(part)
        return
    elif isinstance(part, types.CellType):
        yield ".cell_contents", getattr(part, "cell_contents", None)
    yield from ((f".{name}", inner) for name, inner in attributes_of(part).items())


def _parts_of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        yield f".{name}", getattr(cell, "cell_contents", None)
    yield from ((f".__defaults__[{i}]", inner) for i, inner in enumerate(fn.__defaults__ or ()))
    yield from ((f".{name}", inner) for name, inner in (fn.__kwdefaults__ or {}).items())
    yield from ((f".{name}", inner) for name, inner in vars(fn).items())


def _is_importable(fn: types.FunctionType) -> bool:
    """True if a function is pickled by its name."""
    found: Any = sys.modules.get(fn.__module__) if fn.__module__ != "__main__" else None
    for name in fn.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is fn
