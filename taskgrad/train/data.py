"""Split the batches of the user into microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dask.base import is_dask_collection
from dask.delayed import Delayed, delayed
from distributed import Client

from taskgrad.errors import TaskgradError
from taskgrad.graph.leaves import External, Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pytree import describe, flatten, tensors
from taskgrad.graph.slices import Dims, SampleFraction, Slice, as_tensors, batch_size, cut
from taskgrad.thunk import Thunk


@dataclass(frozen=True)
class Batch:
    """A batch in microbatches: nodes of their inputs and targets, and the share of each.

    `size` is the number of samples, None if the batch is on a worker.
    """

    inputs: list[Node]
    targets: list[Node]
    weights: list[float | Node]
    size: int | None
    loss_kind: str

    @property
    def count(self) -> int:
        """The number of microbatches."""
        return len(self.inputs)

    @property
    def is_intact(self) -> bool:
        """False if a tensor of the driver's was written since the batch was split."""
        try:
            for node in (*self.inputs, *self.targets):
                if isinstance(node, Leaf):
                    node.sent()
        except TaskgradError:
            return False
        return True


@dataclass(frozen=True)
class MicrobatchSplitter:
    """Splits batches into microbatches.

    `weighted` is false for a loss that is a sum over samples: its microbatches just add up. `first`
    and `last` are the workers that take inputs and targets.
    """

    client: Client
    microbatches: int
    in_dims: Dims
    target_dims: Dims
    weighted: bool
    first: str
    last: str
    loss_kind: str

    def split(self, x: Any, y: Any, kept: bool = False) -> Batch:
        """Inputs and targets of one batch, in microbatches.

        If it is `kept`, what could be written without torch's noticing is copied.

        Raises ValueError if inputs and targets differ in their number of samples, or have none;
        TaskgradError if there are thunks of another client.
        """
        for leaf in [*flatten(x)[0], *flatten(y)[0]]:
            owner = leaf._session if isinstance(leaf, Thunk) else None
            if owner is not None and owner.client is not self.client:
                raise TaskgradError(
                    f"{leaf!r} is a thunk of another client than the trainer's chain, and so of "
                    "other workers. Make it while the chain's client is the current one "
                    "(with client.as_current(): ...)"
                )
        there = [on_workers(value) for value in (x, y)]
        if any(there):
            if not all(there):
                raise ValueError(
                    "inputs and targets are both on the driver, or both Dask collections; got "
                    f"{describe(x)} and {describe(y)}"
                )
            return self._split_there(_node_of(x), _node_of(y))
        x, y = as_tensors(x), as_tensors(y)
        if not tensors(x):
            raise ValueError(f"the inputs of a batch hold tensors or arrays; got {describe(x)}")
        sizes = [
            batch_size(x, self.in_dims, "the inputs"),
            batch_size(y, self.target_dims, "the targets"),
        ]
        size = check_size(sizes[0] if sizes[0] is not None else sizes[1], x)
        if sizes[1] not in (None, size):
            raise ValueError(
                f"the inputs have {size} samples and the targets {sizes[1]}: {describe(x)} and "
                f"{describe(y)}"
            )
        count = min(self.microbatches, size)
        inputs, targets, weights = [], [], []
        for m in range(count):
            part = cut(x, self.in_dims, m, count, "the inputs")
            own = size // count + (m < size % count)
            inputs.append(Leaf(part, needs_grad=False, kept=kept))
            target = cut(y, self.target_dims, m, count, "the targets")
            targets.append(Leaf(target, needs_grad=False, kept=kept))
            weights.append(own / size if self.weighted else 1.0)
        return Batch(list(inputs), list(targets), list(weights), size, self.loss_kind)

    def _split_there(self, x: Node, y: Node) -> Batch:
        count = self.microbatches
        inputs: list[Node] = [
            Slice(x, self.in_dims, m, count, "the inputs", self.first) for m in range(count)
        ]
        targets: list[Node] = [
            Slice(y, self.target_dims, m, count, "the targets", self.last) for m in range(count)
        ]
        weights: list[float | Node] = [
            SampleFraction(x, self.in_dims, m, count, "the inputs", self.first)
            if self.weighted
            else 1.0
            for m in range(count)
        ]
        return Batch(inputs, targets, weights, None, self.loss_kind)


def check_size(size: int | None, batch: Any) -> int:
    """The number of samples in a batch; ValueError where there are none, or nothing says it."""
    if size is None:
        raise ValueError("in_dims names no dimension of the inputs to cut a batch along")
    if size == 0:
        raise ValueError(f"the batch is empty: {describe(batch)}")
    return size


def on_workers(value: Any) -> bool:
    """True if any leaf is a Dask collection."""
    return any(is_dask_collection(leaf) for leaf in flatten(value)[0])


def _node_of(value: Any) -> Node:
    if isinstance(value, Thunk):
        return value._node
    return External(value if isinstance(value, Delayed) else delayed(value))


def pair(item: Any, where: str) -> Sequence[Any]:
    """Inputs and targets of what a loader yields.

    Raises ValueError if it is not a pair.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(
            f"{where} yields pairs (inputs, targets), each a tensor or a pytree of them; got "
            f"{describe(item)}"
        )
    return item
