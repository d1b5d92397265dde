"""Split the batches of the user into microbatches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dask.base import is_dask_collection
from dask.delayed import Delayed, delayed
from distributed import Client

from taskgrad.errors import TaskgradError
from taskgrad.graph.leaves import External, Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pytree import describe, flatten, tensors
from taskgrad.graph.slices import Dims, SampleFraction, Slice, as_tensors, batch_size, cut
from taskgrad.thunk import Thunk
from taskgrad.train.batch_form import BatchForm
from taskgrad.train.loss_weight import LossWeight


class Arguments(NamedTuple):
    """What the model is called with for one microbatch: a node for each argument."""

    args: tuple[Node, ...]
    kwargs: dict[str, Node]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those of all arguments."""
        return (*self.args, *self.kwargs.values())


@dataclass(frozen=True)
class Batch:
    """A batch in microbatches: nodes of their inputs and targets, and the share of each.

    `size` is the number of samples, None if the batch is on a worker. With a `loss_weight` the
    microbatches have `loss_weights`, of which the shares are made. The factors of their losses are
    then values of the step: `scales`, and `rescale` for the sum of the gradients, if needed.
    """

    inputs: list[Arguments]
    targets: list[Node]
    weights: list[float | Node]
    size: int | None
    loss_kind: str
    loss_weights: tuple[float, ...] = ()
    scales: tuple[Leaf, ...] = ()
    rescale: Leaf | None = None

    @property
    def values(self) -> list[Node]:
        """The nodes of inputs and targets."""
        return [*(node for given in self.inputs for node in given.nodes), *self.targets]

    @property
    def leaves(self) -> list[Leaf]:
        """All values of the driver's that a step on this batch takes."""
        factors = self.scales if self.rescale is None else (*self.scales, self.rescale)
        return [*(node for node in self.values if isinstance(node, Leaf)), *factors]

    @property
    def form(self) -> tuple[int, tuple[str, ...]]:
        """How many positional arguments the model is called with, and by which keywords."""
        return len(self.inputs[0].args), tuple(self.inputs[0].kwargs)

    @property
    def weight(self) -> float | None:
        """What its loss counts for in means over batches; None if that is on a worker."""
        return sum(self.loss_weights) if self.loss_weights else self.size

    @property
    def count(self) -> int:
        """The number of microbatches."""
        return len(self.inputs)

    @property
    def is_intact(self) -> bool:
        """False if a tensor of the driver's was written since the batch was split."""
        try:
            for node in self.values:
                if isinstance(node, Leaf):
                    node.sent()
        except TaskgradError:
            return False
        return True


@dataclass(frozen=True)
class MicrobatchSplitter:
    """Splits batches into microbatches.

    `weighted` is false for a loss that is a sum over samples: its microbatches just add up. `ends`
    has of each replica, by turns, the workers that take inputs and targets. Microbatches count by
    their number of samples if there is no `loss_weight`.
    """

    client: Client
    microbatches: int
    in_dims: Dims
    target_dims: Dims
    weighted: bool
    ends: Sequence[tuple[str, str]]
    loss_kind: str
    form: BatchForm
    loss_weight: LossWeight | None

    def split(self, x: Any, y: Any, kept: bool = False) -> Batch:
        """Inputs and targets of one batch, in microbatches.

        If it is `kept`, what could be written without torch's noticing is copied.

        Raises ValueError if inputs and targets differ in their number of samples, or have none, or
        if all weights are 0; TypeError if the model cannot be called with them; TaskgradError if
        there are thunks of another client.
        """
        x = self.form.inputs(x)
        self.form.check_trains(x, y)
        for leaf in [*flatten(x)[0], *flatten(y)[0]]:
            owner = leaf._session if isinstance(leaf, Thunk) else None
            if owner is not None and owner.client is not self.client:
                raise TaskgradError(
                    f"{leaf!r} is a thunk of another client than the trainer's chain, and so of "
                    "other workers. Make it while the chain's client is the current one "
                    "(with client.as_current(): ...)"
                )
        there = [on_workers(value) for value in ((x,) if self.form.own_loss else (x, y))]
        if any(there):
            if not all(there):
                raise ValueError(
                    "inputs and targets are both on the driver, or both Dask collections; got "
                    f"{describe(x)} and {describe(y)}"
                )
            self.refuse_weighing(x)
            return self._split_there(x, y)
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
        inputs: list[Arguments] = []
        targets: list[Node] = []
        weights: list[float | Node] = []
        loss_weights: list[float] = []
        for m in range(count):
            part = cut(x, self.in_dims, m, count, "the inputs")
            args, kwargs = self.form.arguments(part)
            leaves = [Leaf(v, needs_grad=False, kept=kept) for v in (*args, *kwargs.values())]
            inputs.append(_arguments(leaves, kwargs))
            target = cut(y, self.target_dims, m, count, "the targets")
            targets.append(Leaf(target, needs_grad=False, kept=kept))
            own = size // count + (m < size % count)
            weights.append(own / size if self.weighted else 1.0)
            if self.loss_weight is not None:
                loss_weights.append(self.loss_weight.of(part, target))
        if loss_weights:
            total = sum(loss_weights)
            if not total:
                raise ValueError(
                    "loss_weight is 0 for all microbatches of the batch, which has nothing to "
                    f"learn from: {describe(x)}"
                )
            weights = [w / total for w in loss_weights]
        return Batch(inputs, targets, weights, size, self.loss_kind, tuple(loss_weights))

    def refuse_weighing(self, x: Any) -> None:
        """Raise ValueError if the loss of a batch that is on workers has a weight."""
        if self.loss_weight is not None:
            raise ValueError(
                "loss_weight weighs batches on the driver, before their microbatches are sent, and "
                f"this batch is a Dask collection: {describe(x)}. Give tensors"
            )

    def _split_there(self, x: Any, y: Any) -> Batch:
        count = self.microbatches
        args, kwargs = self.form.arguments(x)
        values = [*args, *kwargs.values()]
        dims = self._dims_there(args, kwargs, alone=len(values) == 1 and values[0] is x)
        sources = [(_node_of(value), dim) for value, dim in zip(values, dims, strict=True)]

        def slices(m: int) -> list[Node]:
            return [Slice(n, dim, m, count, "the inputs", self._first(m)) for n, dim in sources]

        inputs = [_arguments(slices(m), kwargs) for m in range(count)]
        targets: list[Node] = [
            Leaf(None, needs_grad=False)
            if self.form.own_loss
            else Slice(_node_of(y), self.target_dims, m, count, "the targets", self._last(m))
            for m in range(count)
        ]
        weights: list[float | Node] = [
            SampleFraction(*sources[0], m, count, "the inputs", self._first(m))
            if self.weighted
            else 1.0
            for m in range(count)
        ]
        return Batch(inputs, targets, weights, None, self.loss_kind)

    def _first(self, microbatch: int) -> str:
        return self.ends[microbatch % len(self.ends)][0]

    def _last(self, microbatch: int) -> str:
        return self.ends[microbatch % len(self.ends)][1]

    def _dims_there(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], alone: bool
    ) -> list[Dims]:
        """The batch dimension of each argument on workers; `alone` if there is one, the batch.

        Raises ValueError if one has none: it is cut there, and nothing else says its size.
        """
        keys = [*range(len(args)), *kwargs]
        if alone or isinstance(self.in_dims, int | None):
            dims = [self.in_dims for _ in keys]
        else:
            try:
                dims = [self.in_dims[key] for key in keys]
            except (KeyError, IndexError, TypeError):
                dims = [None]
        if None in dims and not alone:
            raise ValueError(
                "each argument of the model in a batch on workers is cut there along its "
                f"in_dims; got {self.in_dims!r} for {', '.join(map(str, keys))}"
            )
        return dims


def _arguments(nodes: Iterable[Node], kwargs: Mapping[str, Any]) -> Arguments:
    """Arguments of these nodes, the last ones by the keywords of `kwargs`."""
    nodes = tuple(nodes)
    positional = len(nodes) - len(kwargs)
    return Arguments(nodes[:positional], dict(zip(kwargs, nodes[positional:], strict=True)))


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
