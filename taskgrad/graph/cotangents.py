"""Sums of gradients, and checks that a cotangent fits the value that it is a cotangent of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from taskgrad.errors import CotangentError
from taskgrad.graph.nodes import Node
from taskgrad.graph.pytree import Structure, carries_gradient, describe, flatten, plain

Gradient = torch.Tensor | None


def add(a: Gradient, b: Gradient) -> Gradient:
    """The sum of two gradients; None counts as zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def add_each(a: Sequence[Gradient], b: Sequence[Gradient]) -> list[Gradient]:
    """The sums of two lists of gradients, one by one."""
    return [add(x, y) for x, y in zip(a, b, strict=True)]


_seen: WeakKeyDictionary[Node, tuple[list[Any], Structure]] = WeakKeyDictionary()


def remember(node: Node, value: Any) -> None:
    """Note the structure, shapes and dtypes of a value seen on the driver, to check cotangents."""
    leaves, structure = flatten(value)
    _seen[node] = list(map(_shape_of, leaves)), structure


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return leaf


def check_cotangent(node: Node, cotangent: Any) -> bool:
    """True if a cotangent fits this node's value, False if the driver has not seen that.

    Raises CotangentError if it does not fit.
    """
    if node not in _seen:
        return False
    match(cotangent, *_seen[node], repr(getattr(node, "title", "the output")))
    return True


def fits(leaf: torch.Tensor, output: Any) -> bool:
    """True if a tensor can be the cotangent of an output, as `match` sees it."""
    return (
        type(output) is torch.Tensor
        and leaf.dtype is output.dtype
        and (leaf.is_floating_point() or leaf.is_complex())
        and leaf.shape == output.shape
        and leaf.layout is output.layout
        and not leaf.is_meta
    )


def match(
    cotangent: Any, outputs: Sequence[Any], structure: Structure, where: str
) -> list[Gradient]:
    """The leaves of a cotangent, checked against those of the output.

    `outputs` are tensors, or anything with the shape, dtype and description of one. None means no
    cotangent, at a leaf or for the whole value.

    Raises CotangentError if structure, shape or dtype differ.
    """
    if cotangent is None:
        return [None] * len(outputs)
    leaves, given = flatten(cotangent)
    if given is not structure and given != structure:
        try:
            if structure.takes_anything and given.takes_anything:
                raise ValueError
            leaves = structure.flatten_up_to(plain(cotangent))
        except ValueError as error:
            objects = structure.has_objects
            expected = structure.name if objects else describe(structure.build(outputs))
            raise CotangentError(
                f"the cotangent for {where} has another structure than the output: expected "
                f"{expected}, got {describe(cotangent)}{f' ({error})' if objects else ''}"
            ) from None
    for leaf, output in zip(leaves, outputs, strict=True):
        if leaf is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise CotangentError(
                f"the cotangent for {where} holds a {type(leaf).__name__}; expected tensors or None"
            )
        if not carries_gradient(output):
            raise CotangentError(
                f"the cotangent for {where} has {describe(leaf)} where the output is "
                f"{describe(output)}, which carries no gradient; give None there"
            )
        if leaf.shape != output.shape or leaf.dtype != output.dtype:
            raise CotangentError(
                f"the cotangent for {where} is {describe(leaf)}; the output is {describe(output)}. "
                "Shape and dtype must be the same"
            )
        if leaf.layout is not output.layout or leaf.is_meta:
            raise CotangentError(
                f"the cotangent for {where} has layout {leaf.layout} and device {leaf.device}; the "
                f"output has layout {output.layout}. Give a tensor of the same layout, with values"
            )
    return leaves
