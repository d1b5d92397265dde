"""Keep the memory layout of tensors that are sent, if copies would have another one.

A copy of a tensor is dense and has memory of its own. Tensors that share memory, or repeat or skip
elements, are sent as views of a common base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class View:
    """Stands for a tensor that is a view of the one at position `base`."""

    base: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Span = tuple[int, int]
"""The first element of a storage that a tensor covers, and the one after the last."""


def with_bases(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | View]:
    """The tensors, with a `View` in place of each that needs one, and then their bases."""
    found: list[torch.Tensor | View] = list(tensors)
    for members in overlapping(tensors):
        if len(members) == 1 and is_dense(tensors[members[0]]):
            continue
        first = min(_span(tensors[i])[0] for i in members)
        last = max(_span(tensors[i])[1] for i in members)
        base = tensors[members[0]].detach().as_strided((last - first,), (1,), first)
        for i in members:
            t = tensors[i]
            found[i] = View(len(found), tuple(t.shape), t.stride(), int(t.storage_offset()) - first)
        found.append(base)
    return found


def without_bases(values: Sequence[Any]) -> list[Any]:
    """Undo `with_bases`, after the tensors were copied."""
    return [
        values[v.base].as_strided(v.shape, v.stride, v.offset) if isinstance(v, View) else v
        for v in values
    ]


def overlapping(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions of the tensors that have memory here, in groups of those that overlap."""
    by_storage: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        if t.layout is torch.strided and t.device.type != "meta" and t.numel():
            key = t.untyped_storage().data_ptr(), t.dtype, t.is_conj(), t.is_neg()
            by_storage.setdefault(key, []).append(i)
    groups: list[list[int]] = []
    for members in by_storage.values():
        end = -1
        for i in sorted(members, key=lambda i: _span(tensors[i])):
            first, last = _span(tensors[i])
            if first >= end:
                groups.append([])
            groups[-1].append(i)
            end = max(end, last)
    return groups


def is_dense(tensor: torch.Tensor) -> bool:
    """True if a tensor covers each element of its span once, in any order of its dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _span(tensor: torch.Tensor) -> Span:
    first = int(tensor.storage_offset())
    steps: Iterable[tuple[int, int]] = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + sum((size - 1) * stride for size, stride in steps) + 1
