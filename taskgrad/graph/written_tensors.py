"""Tensors that a forward makes itself, with values on the driver, and writes activations into.

From then on such a tensor is an activation, and so is all that sees the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from taskgrad.graph.activation import Activation, CannotFollowError
from taskgrad.graph.known_values import KnownValues

Call = Callable[[str, Callable[..., Any], Any, Any], Any]


class WrittenTensors:
    """The tensors of one call that have become activations.

    Parameters
    ----------
    known
        What is computed here.
    call
        Adds a function to the graph, given what it is, the function, and its arguments.
    cannot
        Makes the error for a forward that cannot be followed.
    """

    def __init__(
        self, known: KnownValues, call: Call, cannot: Callable[[str], CannotFollowError]
    ) -> None:
        self._known, self._call, self._cannot = known, call, cannot
        self._made: dict[int, tuple[torch.Tensor, Activation]] = {}  # by storage
        self._views: dict[int, Activation] = {}  # by the ids of tensors
        self._alive: list[torch.Tensor] = []

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return bool(self._made) and storage_of(tensor) in self._made

    def add(self, tensor: torch.Tensor, operation: str) -> None:
        """An activation is written into this tensor next."""
        if not self._known.was_made(tensor):
            raise self._cannot(
                f"{operation} writes an activation into a tensor that was there before the call"
            )
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        whole = tensor
        if not tensor.is_contiguous() or tensor.numel() != count:
            whole = tensor.detach().as_strided((count,), (1,), 0)
        made = self._call("clone", torch.clone, (whole,), {})
        self._made[tensor.untyped_storage()._cdata] = whole, made
        self._views[id(whole)] = made

    def activation_of(self, tensor: torch.Tensor) -> Activation:
        """The activation that a tensor is now."""
        found = self._views.get(id(tensor))
        if found is not None:
            return found
        whole, made = self._made[tensor.untyped_storage()._cdata]
        if tensor.dtype is not whole.dtype:
            raise self._cannot("an activation is written into a tensor with views of other dtypes")
        shown = tensor.shape, tensor.stride(), tensor.storage_offset()
        found = made
        if shown != (whole.shape, whole.stride(), whole.storage_offset()):
            found = self._call("as_strided", torch.as_strided, (made, *shown), {})
        self._views[id(tensor)] = found
        self._alive.append(tensor)
        return found


def storage_of(tensor: torch.Tensor) -> int | None:
    """What tells apart the memory of tensors; None where there is none."""
    if isinstance(tensor, Activation) or tensor.layout is not torch.strided:
        return None
    try:
        found: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # within torch.vmap
        return None
    return found
