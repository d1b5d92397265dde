"""The items of a map, as rows of arguments, and how they are cut into chunks. Runs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from taskgrad.graph.copies import Pulled

_END = object()
# Iterating over these runs no code that could change an item.
_HELD = (list, tuple, range, dict, str, np.ndarray, torch.Tensor, torch.nn.Parameter)

Row = tuple[Any, ...]


def read_rows(iterables: Sequence[Iterable[Any]]) -> list[Row]:
    """The n-th items of all iterables, as row n: each is the arguments of one call.

    Items keep the values that they had when they were pulled.

    Raises
    ------
    TypeError
        One cannot be iterated over, or there is none.
    ValueError
        One ends before another.
    """
    if not iterables:
        raise TypeError("a map takes a function and at least one iterable of items")
    for place, given in enumerate(iterables):
        if not hasattr(given, "__iter__") and not hasattr(given, "__getitem__"):
            raise TypeError(
                f"argument {place + 1} of a map, after the function, is a {type(given).__name__}, "
                "which is not iterable"
            )
    iterators = [iter(given) for given in iterables]
    columns = [_Kept() if type(given) in _HELD else Pulled() for given in iterables]
    count = 0
    while True:
        row = []
        for iterator, column in zip(iterators, columns, strict=True):
            row.append(next(iterator, _END))
            if row[-1] is not _END:
                column.add(row[-1])  # before the next one is pulled, which may refill it
        ended = [k for k, item in enumerate(row) if item is _END]
        if not ended:
            count += 1
        elif len(ended) == len(row):
            return list(zip(*(column.values() for column in columns), strict=True))
        else:
            longer = next(k for k, item in enumerate(row) if item is not _END)
            raise ValueError(
                f"the iterables of a map have unequal lengths: the one at position {ended[0]} "
                f"ended after {count} items, and the one at position {longer} has more"
            )


class _Kept(Pulled):
    """Items of a container that holds all of them, which need no copies."""

    def add(self, value: Any) -> None:
        self._values.append(value)


def cut(count: int, size: int) -> list[range]:
    """Chunks of this many items, the last one maybe smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def share(count: int, weights: Sequence[int]) -> list[range]:
    """`count` items in a row over takers with these weights, as evenly as whole items allow.

    One range for each taker, in order, those at the end empty where there are fewer items.
    """
    total = sum(weights)
    edges, so_far = [0], 0
    for weight in weights:
        so_far += weight
        edges.append(-(-count * so_far // total))
    return [range(a, b) for a, b in itertools.pairwise(edges)]
