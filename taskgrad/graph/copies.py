"""Copies of inputs that may be written to before they are used.

Inputs that are sent or pickled before a call returns need no copy. Torch counts the writes to its
own memory, but not those to memory that it shares with NumPy or others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from taskgrad.graph.pytree import flatten, map_leaves


def own_copy(value: Any) -> Any:
    """The same value with its tensors and arrays in memory of their own."""
    return map_leaves(_copied, value)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.nn.Parameter):
        return torch.nn.Parameter(leaf.detach().clone(), leaf.requires_grad)
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def unwatched_copy(value: Any) -> Any:
    """The same value, with copies of those tensors whose writes torch does not count."""
    return map_leaves(lambda leaf: leaf.detach().clone() if is_unwatched(leaf) else leaf, value)


def is_unwatched(leaf: Any) -> bool:
    """True if the leaf is a tensor whose memory others than torch may write."""
    if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
        return False
    if is_functorch_wrapped_tensor(leaf):  # it has no storage, and calls refuse it
        return False
    return leaf.device.type == "cpu" and not leaf.untyped_storage().resizable()


class Pulled:
    """Values as they were when each was pulled from an iterator that may reuse its memory.

    Objects are copied only if the iterator yields the same memory again; other objects belong to
    the caller, and later writes to them show.
    """

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._copies: list[Any] = []
        self._memory: set[int] = set()
        self._reuses = False

    def add(self, value: Any) -> None:
        """Add the value that was just pulled."""
        leaves, structure = flatten(value, _has_memory)
        copied = structure.build([_pulled(leaf) for leaf in leaves])
        if not structure.has_objects:
            self._values.append(copied)
            self._copies.append(copied)
            return
        found = {_address(leaf) for leaf in leaves if _has_memory(leaf)}
        self._reuses |= not found.isdisjoint(self._memory)
        self._memory |= found
        self._values.append(value)
        self._copies.append(copied)

    def values(self) -> list[Any]:
        """All of them, in order."""
        return self._copies if self._reuses else self._values


def _pulled(leaf: Any) -> Any:
    """A copy through which gradients flow."""
    return leaf if isinstance(leaf, torch.nn.Parameter) else _copied(leaf)


def _has_memory(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | np.ndarray)


def _address(leaf: Any) -> int:
    if isinstance(leaf, np.ndarray):
        return int(leaf.ctypes.data)
    return leaf.data_ptr() if leaf.layout is torch.strided else id(leaf)
