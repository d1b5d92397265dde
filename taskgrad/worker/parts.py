"""Parts of sharded tensors on their worker: kept in its store, made and read by calls.

What is in the store is never written: a call gets a copy, and a function here gives a new tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from taskgrad.errors import WorkerLostError
from taskgrad.graph.parts import StoredPart
from taskgrad.graph.pytree import Structure
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.worker.forward import Forward
from taskgrad.worker.settings import applied
from taskgrad.worker.store import Kept, Store


class TensorInfo(NamedTuple):
    """What the driver is told of a tensor that stays on its worker."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout


class KeptOutput(NamedTuple):
    """What the driver is told of a function's output that stays.

    `leaves` has a `TensorInfo` for each tensor, other values as they are; `flags` says for each
    whether a gradient can flow into it.
    """

    leaves: list[Any]
    structure: Structure
    flags: list[bool]


def info_of(leaf: Any) -> Any:
    """What the driver is told of a leaf: the leaf itself if it is no tensor."""
    if isinstance(leaf, torch.Tensor):
        return TensorInfo(tuple(leaf.shape), leaf.dtype, leaf.layout)
    return leaf


def read(store: Store, part: StoredPart) -> Any:
    """What a call reads of a part; WorkerLostError if it is not here."""
    value = store.kept(part.key)[part.position]
    return value[part.cut] if part.cut else value


@dataclass(frozen=True)
class KeepOutput:
    """Run the function of a rank, and keep the leaves of what it gives."""

    work: Forward

    def run(self, store: Store, *values: Any) -> KeptOutput:
        """The description; the leaves are in the store under the call's key.

        Raises WorkerLostError if Dask runs the task again, its result having been moved to another
        worker and lost there: the other ranks do not run again with it.
        """
        call = self.work.call
        if store.get(call.key) is not None:
            raise WorkerLostError(f"the result of {call.rank or call.title} was lost. Call again")
        leaves, structure, flags = self.work.run(store, *values)
        store.put(call.key, Kept(leaves))
        return KeptOutput([info_of(leaf) for leaf in leaves], structure, flags)


@dataclass(frozen=True)
class OnParts:
    """A function of `taskgrad.worker` on the values of parts; it is pickled by reference."""

    key: str
    title: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    stays: bool

    def run(self, store: Store, *values: Any) -> Any:
        """The function's result; if that stays, its description."""
        result = self.function(store, *values, **self.arguments)
        if not self.stays:
            return result
        store.put(self.key, Kept([result]))
        return info_of(result)


class PartJob(NamedTuple):
    """One call on parts, its settings of torch, and its inputs: values, or what is in the store."""

    action: OnParts
    settings: TorchSettings
    inputs: list[Any]


@dataclass(frozen=True)
class RunParts:
    """Calls on parts, one after the other, as an action of a resident program."""

    title: str = "calls on sharded tensors"

    def run(self, store: Store, jobs: Sequence[PartJob]) -> list[Any]:
        """What each call gives. Raises the error of the first one that fails."""
        found = []
        for action, settings, inputs in jobs:
            given = [read(store, i) if type(i) is StoredPart else i for i in inputs]
            with applied(settings, store.worker, store.give_thread_back):
                found.append(action.run(store, *given))
        return found
