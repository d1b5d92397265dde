"""The items of a map as rows of arguments, and how they are divided among workers and threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from taskgrad.arguments import iterator
from taskgrad.graph.copies import Pulled

_END = object()
# Containers whose iteration runs no code that could change an item.
_CONTAINERS = (list, tuple, range, dict, str, np.ndarray, torch.Tensor, torch.nn.Parameter)

Row = tuple[Any, ...]


def read_rows(iterables: Sequence[Iterable[Any]]) -> list[Row]:
    """Zip the iterables: row n has the n-th item of each, the arguments of one call.

    Items keep the values that they had when they were pulled.

    Raises
    ------
    TypeError
        One is not iterable, or there is none.
    ValueError
        One ends before another.
    """
    if not iterables:
        raise TypeError("a map takes a function and at least one iterable of items")
    iterators = [iterator("map", place, given) for place, given in enumerate(iterables)]
    columns = [_Uncopied() if type(given) in _CONTAINERS else Pulled() for given in iterables]
    count = 0
    while True:
        row = []
        for items, column in zip(iterators, columns, strict=True):
            row.append(next(items, _END))
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


class _Uncopied(Pulled):
    """Items of a container, which need no copies."""

    def add(self, value: Any) -> None:
        self._values.append(value)


def cut(count: int, size: int) -> list[range]:
    """Chunks of this many items, the last one maybe smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def share(count: int, weights: Sequence[int]) -> list[range]:
    """Divide `count` items in proportion to these weights, as evenly as whole items allow.

    One range for each weight, in order; with few items those at the end are empty.
    """
    total = sum(weights)
    edges, so_far = [0], 0
    for weight in weights:
        so_far += weight
        edges.append(-(-count * so_far // total))
    return [range(a, b) for a, b in itertools.pairwise(edges)]
