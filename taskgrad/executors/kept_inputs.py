"""Driver: which tensors the workers of a group keep, so that they are not sent with every call.

A tensor is kept for as long as it exists and is what it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from taskgrad.executors.tensor_table import TensorTable, state_of
from taskgrad.worker.rank_forward import KeptInput


@dataclass
class _Kept:
    """A tensor under its number, and the ranks of the workers that it was sent to."""

    number: int
    ranks: set[int] = field(default_factory=set)


class KeptInputs:
    """The tensors that one group keeps; ``drop(numbers)`` has its workers drop some."""

    def __init__(self, drop: Callable[[list[int]], None]) -> None:
        self._kept = TensorTable[_Kept](lambda kept: drop([kept.number]))
        self._numbers = itertools.count()

    def begin(self) -> CallInputs:
        """The inputs of one call, in which every tensor is checked once."""
        return CallInputs(self)

    def find(self, tensor: torch.Tensor) -> _Kept | None:
        """What is known of a tensor as it is now; None for one that is not kept."""
        state = state_of(tensor)
        if state is None:
            return None
        return self._kept.get(tensor, state, lambda: _Kept(next(self._numbers)))


class CallInputs:
    """The inputs of one call, by the ranks that take them."""

    def __init__(self, kept: KeptInputs) -> None:
        self._kept = kept
        self._found: dict[int, _Kept | None] = {}

    def given(self, rank: int, tensor: torch.Tensor, value: Any) -> Any:
        """The input of a rank: a reference to what its worker keeps, or the value to be sent."""
        if id(tensor) not in self._found:
            self._found[id(tensor)] = self._kept.find(tensor)
        known = self._found[id(tensor)]
        if known is None:
            return value
        if rank in known.ranks:
            return KeptInput(known.number)
        known.ranks.add(rank)
        return KeptInput(known.number, value)
