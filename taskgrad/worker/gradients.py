"""Gradients of parameters, from a backward into ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

Gradient = torch.Tensor | None


def own(grads: dict[str, Gradient], shared: Iterable[Any]) -> dict[str, Gradient]:
    """The same gradients, each in memory that is all its own, so that it can be added to.

    Autograd may give one tensor for several: for both terms of a sum, say, and for the cotangent
    that came in. `shared` are the other tensors that go somewhere, as inputs or results of a task.
    """
    taken = {
        t.untyped_storage().data_ptr()
        for t in shared
        if isinstance(t, torch.Tensor) and t.layout is torch.strided
    }
    found: dict[str, Gradient] = {}
    for name, grad in grads.items():
        if grad is not None and grad.layout is torch.strided:
            storage = grad.untyped_storage()
            # Not its size: what is expanded has less memory than elements, a view has more.
            if storage.data_ptr() in taken or storage.nbytes() != grad.numel() * grad.itemsize:
                grad = grad.clone()
            taken.add(grad.untyped_storage().data_ptr())
        found[name] = grad
    return found


def accumulate_into(
    parameter: nn.Parameter, parts: Sequence[Gradient], borrowed: Iterable[Any]
) -> None:
    """Add the sum of these parts, in order, to a parameter's gradient.

    They are summed before they are added, as autograd does for a parameter that is used twice.
    `borrowed` are values that are not ours to keep: Dask's memory.
    """
    total: Gradient = None
    for part in parts:
        if part is not None:
            part = part.to(parameter.device)
            total = part if total is None else total + part
    if total is None:
        return
    grad = parameter.grad
    if grad is None:
        parameter.grad = total.clone() if any(total is value for value in borrowed) else total
    elif grad.layout is total.layout is torch.strided:
        grad.add_(total)
    else:
        parameter.grad = grad + total
