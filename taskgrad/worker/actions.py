"""The actions besides `Forward` and `Backward`: what one task does with a worker's store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.graph.cotangents import add_each
from taskgrad.graph.pytree import cotangents, flatten
from taskgrad.graph.slices import Dims, as_tensors, batch_size, cut
from taskgrad.worker.devices import do_results_stay, to_device
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
    """The sum of cotangents of one value, leaf by leaf, in order; None counts as zero."""

    def run(self, store: Store, *parts: Any) -> Any:
        """The sum; None if all are None."""
        total, *rest = [part for part in parts if part is not None] or [None]
        for part in rest:
            ours, structure = flatten(total)
            theirs = [_beside(y, x) for y, x in zip(flatten(part)[0], ours, strict=True)]
            total = cotangents(add_each(ours, theirs), structure)
        return total


def _beside(y: torch.Tensor | None, x: torch.Tensor | None) -> torch.Tensor | None:
    """`y` on the device of `x`: the two may come from workers with and without a GPU."""
    return y if y is None or x is None else to_device(y, x.device)


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
class TakeGradients:
    """Gradients of parameters that the backward task `key` left on this worker, which drops them.

    They stay on their device for this worker, or in a program; a task has them on the host for
    another worker.
    """

    key: str
    names: tuple[str, ...]
    stays: bool

    def run(self, store: Store, *after: Any) -> list[torch.Tensor | None]:
        """One for each name; None where none arrived."""
        found = store.take_gradients(self.key, self.names)
        stay = self.stays or do_results_stay()
        return [g if g is None or stay else g.cpu() for g in found]


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
    """Several read actions in one task; none of them takes values."""

    reads: tuple[Any, ...]

    def run(self, store: Store, *after: Any) -> list[Any]:
        """Their results, in order."""
        return [read.run(store) for read in self.reads]


@dataclass(frozen=True)
class TakeSlice:
    """Microbatch `index` of `count`; or what `fraction` of the batch it is."""

    dims: Dims
    index: int
    count: int
    what: str
    fraction: bool

    def run(self, store: Store, batch: Any) -> Any:
        """The slice, in memory of its own; or its fraction of the samples.

        Raises ValueError if there are fewer samples than microbatches, or the dimensions do not
        fit.
        """
        batch = as_tensors(batch)
        total = batch_size(batch, self.dims, self.what)
        if total is None or total < self.count:
            raise ValueError(
                f"{self.what} has {total or 'no'} samples, and a step has {self.count} microbatches"
                ". A batch that is on a worker is cut there: take fewer microbatches"
            )
        part = cut(batch, self.dims, self.index, self.count, self.what)
        if self.fraction:
            return (batch_size(part, self.dims, self.what) or 0) / total
        return part


@dataclass(frozen=True)
class OnShard:
    """A function of `taskgrad.worker` on a shard; it is pickled by reference."""

    token: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self, store: Store, *values: Any) -> Any:
        """The function's result."""
        with using_shard():
            return self.function(store, self.token, *values, **self.arguments)
