"""The small actions, besides `Forward` and `Backward`: what one task does with a worker's store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.graph.cotangents import add_each
from taskgrad.graph.pytree import cotangents, flatten
from taskgrad.worker.shard_lock import using_shard
from taskgrad.worker.store import Store, buffers_key


@dataclass(frozen=True)
class Pick:
    """One of several results of the task before."""

    position: int

    def run(self, store: Store, value: Any) -> Any:
        """The result at `position`."""
        return value[self.position]


@dataclass(frozen=True)
class Add:
    """Cotangents of one value added up, leaf by leaf, in order; None counts as zero."""

    def run(self, store: Store, *parts: Any) -> Any:
        """Their sum; None if there is none."""
        total: Any = None
        for part in parts:
            if part is None:
                continue
            if total is None:
                total = part
                continue
            ours, structure = flatten(total)
            theirs, _ = flatten(part)
            total = cotangents(add_each(ours, theirs), structure)
        return total


@dataclass(frozen=True)
class ReadGradient:
    """A parameter's gradient that the backward task `key` left on this worker."""

    key: str
    name: str

    def run(self, store: Store, *after: Any) -> torch.Tensor | None:
        """The gradient, on the host; None where none arrived."""
        grad = store.gradients(self.key).get(self.name)
        return None if grad is None else grad.cpu()


@dataclass(frozen=True)
class ReadBuffers:
    """The changed buffers that the forward task `token` left on this worker."""

    token: str

    def run(self, store: Store, *after: Any) -> list[torch.Tensor | None]:
        """One for each buffer slot of the call; None where it did not change."""
        found: list[torch.Tensor | None] = store.pop(buffers_key(self.token))
        return [None if b is None else b.detach().cpu() for b in found]


@dataclass(frozen=True)
class ReadAll:
    """Several reads, each an action of its own, that take no values."""

    reads: tuple[Any, ...]

    def run(self, store: Store, *after: Any) -> list[Any]:
        """What each gives, in order."""
        return [read.run(store) for read in self.reads]


@dataclass(frozen=True)
class OnShard:
    """A function of `taskgrad.worker` on a shard; it is pickled by reference."""

    token: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self, store: Store, *values: Any) -> Any:
        """What the function gives."""
        with using_shard():
            return self.function(store, self.token, *values, **self.arguments)
