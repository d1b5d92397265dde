"""Nested values at the boundaries: containers, and any object that holds tensors.

Containers are tuples, lists, dicts, named tuples, dataclasses and what is registered with
``torch.utils._pytree``; their elements are leaves, None, numbers and strings too. Any other object
is one leaf, unless it holds tensors: then those are the leaves, and the rest of it is part of the
structure (`taskgrad.graph.objects`). Only tensors carry gradients.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from taskgrad.errors import CotangentError, TravelError
from taskgrad.graph import objects
from taskgrad.graph.objects import Opaque

Leaves = list[Any]
Holds = Callable[[Any], bool]
"""Says if an object that holds such a leaf is split into its leaves and the rest."""


@dataclass(frozen=True)
class Slot(Opaque):
    """Stands in a template for the value of one input, by position."""

    index: int


@dataclass(frozen=True)
class Structure(Opaque):
    """How to build a value from its leaves. Plain data, compared with ``==``.

    `kind` is the sort of container, `context` what it has besides its children.
    """

    kind: str
    context: Any = None
    children: tuple[Structure, ...] = ()

    def __reduce__(self) -> Any:
        if self.kind == "registered" and not self.takes_anything:
            node = _registered(self.context[0])
            return _arrived, (self.context, self.children, node.flatten_fn, node.unflatten_fn)
        if self.kind == "leaf":
            return "_LEAF"
        return Structure, (self.kind, self.context, self.children)

    def build(self, leaves: Sequence[Any]) -> Any:
        """The value with these leaves, in the order in which `flatten` returns them."""
        return leaves[0] if self.kind == "leaf" else self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        return _put_together(self.kind, self.context, [c._build(leaves) for c in self.children])

    def flatten_up_to(self, tree: Any) -> Leaves:
        """The parts of another value of this structure, one for each leaf of this one.

        None in place of a part means None at all leaves of that part.

        Raises ValueError if the other value has another structure.
        """
        if self.kind == "leaf":
            return [tree]
        if tree is None:
            return [None] * self.count
        parts = zip(self.children, self.parts_of(tree), strict=True)
        return [leaf for child, part in parts for leaf in child.flatten_up_to(part)]

    def parts_of(self, tree: Any) -> list[Any]:
        """The children of another value; ValueError unless it is the same kind of container."""
        if self.kind == "object":
            return objects.at_places(tree, self.context)
        kind, context, parts = _take_apart(tree) or ("leaf", None, ())
        same = (kind, context) == (self.kind, self.context)
        if not same or len(parts) != len(self.children):
            raise ValueError(f"expected a {self.name}, got {describe(tree)}")
        return list(parts)

    @cached_property
    def count(self) -> int:
        """How many leaves there are."""
        return 1 if self.kind == "leaf" else sum(child.count for child in self.children)

    @cached_property
    def parameters(self) -> frozenset[int]:
        """The leaves, by position, that are Parameters of an object, as a module is."""
        if self.kind == "object":
            return frozenset(self.context.parameters)
        found: set[int] = set()
        before = 0
        for child in self.children:
            found.update(before + i for i in child.parameters)
            before += child.count
        return frozenset(found)

    @cached_property
    def skeletons(self) -> list[bytes]:
        """The pickles of its objects, without their leaves."""
        own = [self.context.data] if self.kind == "object" else []
        return own + [data for child in self.children for data in child.skeletons]

    @cached_property
    def has_objects(self) -> bool:
        """True if it has objects that are not containers."""
        return self.kind == "object" or any(child.has_objects for child in self.children)

    @cached_property
    def is_builtin(self) -> bool:
        """True if it has no containers but tuples, lists and dictionaries."""
        own = self.kind in ("leaf", "tuple", "list", "dict")
        return own and all(child.is_builtin for child in self.children)

    @cached_property
    def takes_anything(self) -> bool:
        """True if the value can be built with any leaves, and then pickled and unpickled."""
        return _takes_anything(self.kind, self.context) and all(
            child.takes_anything for child in self.children
        )

    @property
    def name(self) -> str:
        """The name of the outermost container's type."""
        if self.kind == "object":
            return str(self.context.kind)
        known = self.context[0] if isinstance(self.context, tuple) and self.context else None
        return known.__name__ if isinstance(known, type) else self.kind


_LEAF = Structure("leaf")


class _Registration(NamedTuple):
    flatten_fn: Callable[[Any], tuple[Iterable[Any], Any]]
    unflatten_fn: Callable[[Iterable[Any], Any], Any]


# Types that were registered in the process that a structure came from, but not in this one.
_elsewhere: dict[type, _Registration] = {}


def _registered(kind: type) -> Any:
    return _pytree.SUPPORTED_NODES.get(kind) or _elsewhere.get(kind)


def _arrived(context: Any, children: tuple[Structure, ...], *registered: Any) -> Structure:
    _elsewhere.setdefault(context[0], _Registration(*registered))
    return Structure("registered", context, children)


def _takes_anything(kind: str, context: Any) -> bool:
    if kind in ("leaf", "tuple", "list", "dict"):
        return True
    if kind == "namedtuple":
        made_by = next(c for c in context[0].__mro__ if "__new__" in vars(c))
        return made_by.__bases__ == (tuple,)  # by collections.namedtuple, and not by its author
    if kind == "dataclass":
        return not (objects.pickles_its_own_way(context[0]) or hasattr(context[0], "__setstate__"))
    return kind == "registered" and context[0].__module__ in ("collections", "torch.return_types")


class Cotangents(Opaque):
    """Cotangents of a value whose type may not accept them in place of its tensors."""

    def __init__(self, leaves: Sequence[Any], structure: Structure) -> None:
        self.leaves = list(leaves)
        self.structure = structure


def cotangents(leaves: Sequence[Any], structure: Structure) -> Any:
    """Cotangents of a value of this structure, in the form in which they are sent."""
    if not structure.takes_anything:
        return Cotangents(leaves, structure)
    return structure.build(leaves)


def plain(value: Any) -> Any:
    """A value as the user gets it, with `Cotangents` as a value of their structure.

    Raises CotangentError if that cannot be built with these.
    """
    if not isinstance(value, Cotangents):
        return value
    try:
        return value.structure.build(value.leaves)
    except Exception as error:
        raise CotangentError(
            f"these gradients cannot be shown as a {value.structure.name}, which does not take "
            f"them in the place of its tensors ({type(error).__name__}: {error}). Ask for those of "
            "the tensors that you make it of"
        ) from error


def holds_inputs(leaf: Any) -> bool:
    """True if a leaf can be an input of a call: a tensor, or a lazy value."""
    return isinstance(leaf, torch.Tensor) or objects.is_lazy(leaf)


_ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis)),
        *(torch.Tensor, nn.Parameter, torch.dtype, torch.device, torch.layout, torch.memory_format),
        *(torch.Generator, Slot, type, types.ModuleType, types.BuiltinFunctionType),
    }
)


def flatten(tree: Any, holds: Holds = holds_inputs) -> tuple[Leaves, Structure]:
    """Leaves in a fixed order (None counts as one), and the structure that rebuilds them.

    An object that is not a container is split if `holds` is true of one of its leaves.

    Raises TravelError if such an object keeps a tensor that requires grad out of its pickle, or the
    value is nested too deeply.
    """
    if type(tree) in _ATOMS:
        return [tree], _LEAF
    if type(tree) is Cotangents:
        return list(tree.leaves), tree.structure
    leaves: Leaves = []
    try:
        return leaves, _flatten(tree, leaves, holds)
    except RecursionError as error:
        raise TravelError(
            f"a value in a {type(tree).__name__} is nested too deeply to be sent: Python's "
            f"recursion limit is {sys.getrecursionlimit()}. Give what it holds as a flat list"
        ) from error


def _flatten(value: Any, leaves: Leaves, holds: Holds) -> Structure:
    kind = type(value)
    if kind in _ATOMS:
        leaves.append(value)
        return _LEAF
    if kind is tuple or kind is list:
        return Structure(
            kind.__name__, None, tuple([_flatten(part, leaves, holds) for part in value])
        )
    if kind is dict:
        parts = tuple([_flatten(part, leaves, holds) for part in value.values()])
        return Structure("dict", tuple(value), parts)
    apart = _take_apart(value)
    if apart is not None:
        name, context, children = apart
        return Structure(name, context, tuple([_flatten(c, leaves, holds) for c in children]))
    opened = None if _is_leaf(value) else objects.open_object(value, holds)
    if opened is None:
        leaves.append(value)
        return _LEAF
    found, skeleton = opened
    leaves.extend(found)
    return Structure("object", skeleton, (_LEAF,) * len(found))


def _is_leaf(value: Any) -> bool:
    """True if a value that is not a container is a leaf by its type."""
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return isinstance(value, torch.Tensor | Opaque | np.generic | type) or objects.is_lazy(value)


def _take_apart(value: Any) -> tuple[str, Any, Sequence[Any]] | None:
    """A container's kind, context and children; None if it is not a container."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind.__name__, None, value
    if kind is dict:
        return "dict", tuple(value), list(value.values())
    if issubclass(kind, tuple) and _pytree.is_namedtuple_class(kind):
        extra = vars(value) if hasattr(value, "__dict__") else {}
        return "namedtuple", (kind, len(value), tuple(extra)), [*value, *extra.values()]
    node = _registered(kind)
    if node is not None:
        children, context = node.flatten_fn(value)
        return "registered", (kind, context), list(children)
    if dataclasses.is_dataclass(kind) and kind.__new__ is object.__new__ and kind is not Slot:
        if issubclass(kind, nn.Module | Opaque):
            return None
        attributes = _attributes(value)
        return "dataclass", (kind, tuple(attributes)), list(attributes.values())
    return None


def _put_together(kind: str, context: Any, parts: list[Any]) -> Any:
    if kind == "tuple":
        return tuple(parts)
    if kind == "list":
        return parts
    if kind == "dict":
        return dict(zip(context, parts, strict=True))
    if kind == "object":
        return objects.close_object(context, parts)
    if kind == "registered":
        return _registered(context[0]).unflatten_fn(parts, context[1])
    if kind == "namedtuple":  # without its own __new__, which may not accept the leaves
        made: Any = tuple.__new__(context[0], parts[: context[1]])
        names, values = context[2], parts[context[1] :]
    else:
        made = object.__new__(context[0])  # without __init__, and also if it is frozen
        names, values = context[1], parts
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _attributes(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set, in their order, and its other attributes."""
    names = [f.name for f in dataclasses.fields(value)]
    present = {name: getattr(value, name) for name in names if hasattr(value, name)}
    found = objects.attributes_of(value)
    return present | {name: found[name] for name in sorted(found.keys() - present.keys())}


def sequence(structures: Sequence[Structure]) -> Structure:
    """The structure of a list of values of these structures."""
    return Structure("list", None, tuple(structures))


def builds(leaves: Sequence[Any], structures: Sequence[Structure]) -> list[Any]:
    """Values of these structures, in order, from the leaves of all."""
    rest = iter(leaves)
    return [structure._build(rest) for structure in structures]


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `fn` applied to every leaf."""
    leaves, structure = flatten(tree)
    mapped = [fn(leaf) for leaf in leaves]
    return Cotangents(mapped, structure) if type(tree) is Cotangents else structure.build(mapped)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves, in order."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def carries_gradient(leaf: Any) -> bool:
    """True if a leaf is a tensor of a dtype that can have a gradient."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def describe(tree: Any) -> str:
    """Shapes and dtypes of a value, for messages: ``(float32[4, 2], int64[4])``."""
    if isinstance(tree, torch.Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    if type(tree) is tuple:
        return "(" + ", ".join(map(describe, tree)) + ("," if len(tree) == 1 else "") + ")"
    if type(tree) is list:
        return "[" + ", ".join(map(describe, tree)) + "]"
    if type(tree) is dict:
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, Cotangents):
        return f"cotangents of a {tree.structure.name}"
    return type(tree).__name__
