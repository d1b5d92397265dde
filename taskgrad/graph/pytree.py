"""Nested values at the boundaries: tuples, lists, dicts, named tuples, dataclasses, anything.

Containers are those of ``torch.utils._pytree`` plus dataclasses. None, numbers and strings are
leaves like any other; only tensors carry gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

Leaves = list[Any]


@dataclass(frozen=True)
class Slot:
    """Stands in a template for the value of one input, by position."""

    index: int


@dataclass(frozen=True)
class Structure:
    """How to build a pytree from its leaves. Plain data, compared with ``==``."""

    spec: Any
    # Where a leaf of `spec` is a dataclass: its type, its field names, and their structures.
    nested: tuple[tuple[type, tuple[str, ...], tuple[Structure, ...]] | None, ...]

    def build(self, leaves: Leaves) -> Any:
        """The pytree with these leaves in the order that `flatten` gave them."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        parts = []
        for inner in self.nested:
            if inner is None:
                parts.append(next(leaves))
            else:
                kind, names, structures = inner
                values = [s._build(leaves) for s in structures]
                parts.append(_rebuild_dataclass(kind, dict(zip(names, values, strict=True))))
        return _pytree.tree_unflatten(parts, self.spec)


def _is_open_dataclass(value: Any) -> bool:
    """Dataclass instances are containers, unless torch already knows their type."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value) is not Slot
        and type(value) not in _pytree.SUPPORTED_NODES
    )


def _rebuild_dataclass(kind: type, values: dict[str, Any]) -> Any:
    made: Any = object.__new__(kind)
    for name, value in values.items():  # past __init__ and frozen: fields only
        object.__setattr__(made, name, value)
    return made


def flatten(tree: Any) -> tuple[Leaves, Structure]:
    """Leaves in a fixed order (None counts as one), and the structure that rebuilds them."""
    parts, spec = _pytree.tree_flatten(tree)
    leaves: Leaves = []
    nested: list[tuple[type, tuple[str, ...], tuple[Structure, ...]] | None] = []
    for part in parts:
        if not _is_open_dataclass(part):
            leaves.append(part)
            nested.append(None)
            continue
        names = tuple(f.name for f in dataclasses.fields(part))
        structures = []
        for name in names:
            inner, structure = flatten(getattr(part, name))
            leaves.extend(inner)
            structures.append(structure)
        nested.append((type(part), names, tuple(structures)))
    return leaves, Structure(spec, tuple(nested))


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `fn` applied to every leaf."""
    leaves, structure = flatten(tree)
    return structure.build([fn(leaf) for leaf in leaves])


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves, in order."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def carries_gradient(leaf: Any) -> bool:
    """Whether a leaf is a tensor of a dtype that can have a gradient."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def describe(tree: Any) -> str:
    """Shapes and dtypes of a value, for messages: ``(float32[4, 2], int64[4])``."""
    if isinstance(tree, torch.Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    if isinstance(tree, tuple):
        return "(" + ", ".join(map(describe, tree)) + ("," if len(tree) == 1 else "") + ")"
    if isinstance(tree, list):
        return "[" + ", ".join(map(describe, tree)) + "]"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in tree.items()) + "}"
    return type(tree).__name__
