"""What a tensor carries beside its values: attributes, and hooks on its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

Hooks = dict[int, Any]


class Beside(NamedTuple):
    """Attributes of a tensor, and its hooks by the numbers that their handles know them by."""

    attributes: dict[str, Any] | None
    gradient_hooks: Hooks | None
    accumulated_hooks: Hooks | None


def beside(tensor: torch.Tensor, *, hooks: bool) -> Beside | None:
    """What a tensor carries, without its hooks unless asked for; None if that is nothing."""
    attributes = vars(tensor) or None
    before: Hooks | None = (tensor._backward_hooks or None) if hooks else None
    after: Hooks | None = (tensor._post_accumulate_grad_hooks or None) if hooks else None
    found = Beside(attributes, before, after)
    return found if any(found) else None


def put_beside(tensor: torch.Tensor, carried: Beside) -> None:
    """Give a tensor what another one carried."""
    if carried.attributes:
        vars(tensor).update(carried.attributes)
    if carried.gradient_hooks:
        tensor._backward_hooks = carried.gradient_hooks
    if carried.accumulated_hooks:
        tensor._post_accumulate_grad_hooks = carried.accumulated_hooks
    # Hooks that are added here get numbers of their own.
    numbers = [*(carried.gradient_hooks or ()), *(carried.accumulated_hooks or ())]
    RemovableHandle.next_id = max([RemovableHandle.next_id, *(n + 1 for n in numbers)])


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether hooks are registered on this tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def parts_beside(tensor: torch.Tensor, *, hooks: bool) -> Iterator[tuple[str, Any]]:
    """Each thing that a tensor carries, with what to call it in a message."""
    carried = beside(tensor, hooks=hooks)
    if carried is None:
        return
    for name, value in (carried.attributes or {}).items():
        yield f"attribute {name!r}", value
    for numbered in (carried.gradient_hooks, carried.accumulated_hooks):
        for hook in (numbered or {}).values():
            yield f"hook {getattr(hook, '__qualname__', type(hook).__name__)!r}", hook
