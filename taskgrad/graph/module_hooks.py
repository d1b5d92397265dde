"""Hooks that a model's forward puts on its own modules, as transformers does to collect outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Hooks = list[tuple[Callable[..., Any], bool]]


def hooks_added(module: nn.Module, own: frozenset[int]) -> tuple[Hooks, Hooks]:
    """The hooks before and after the forward that the model has added since it was copied."""
    before = [
        (hook, key in module._forward_pre_hooks_with_kwargs)
        for key, hook in module._forward_pre_hooks.items()
        if key not in own
    ]
    after = [
        (hook, key in module._forward_hooks_with_kwargs)
        for key, hook in module._forward_hooks.items()
        if key not in own
    ]
    return before, after


@contextlib.contextmanager
def without_added(module: nn.Module, own: frozenset[int]) -> Iterator[None]:
    """Leave a module only its own hooks in the block."""
    tables: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
    was = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key in table if key not in own]:
            del table[key]
    try:
        yield
    finally:
        for table, entries in zip(tables, was, strict=True):
            table.update(entries)
