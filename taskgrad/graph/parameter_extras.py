"""What a tensor has besides its values: attributes, and hooks on its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

Hooks = dict[int, Any]


class TensorExtras(NamedTuple):
    """Attributes of a tensor, and its hooks by the numbers that their handles know them by."""

    attributes: dict[str, Any] | None
    gradient_hooks: Hooks | None
    accumulated_hooks: Hooks | None


def extras_of(tensor: torch.Tensor, *, hooks: bool) -> TensorExtras | None:
    """The extras of a tensor, its hooks only if asked for; None if it has none."""
    attributes = vars(tensor) or None
    before: Hooks | None = (tensor._backward_hooks or None) if hooks else None
    after: Hooks | None = (tensor._post_accumulate_grad_hooks or None) if hooks else None
    found = TensorExtras(attributes, before, after)
    return found if any(found) else None


def set_extras(tensor: torch.Tensor, carried: TensorExtras) -> None:
    """Give a tensor the extras of another one."""
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
    """True if hooks are registered on this tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def named_extras(tensor: torch.Tensor, *, hooks: bool) -> Iterator[tuple[str, Any]]:
    """Each attribute and hook of a tensor, with its name for messages."""
    carried = extras_of(tensor, hooks=hooks)
    if carried is None:
        return
    for name, value in (carried.attributes or {}).items():
        yield f"attribute {name!r}", value
    for numbered in (carried.gradient_hooks, carried.accumulated_hooks):
        for hook in (numbered or {}).values():
            yield f"hook {getattr(hook, '__qualname__', type(hook).__name__)!r}", hook
