"""Over a whole loader, without training: evaluate, predict."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from taskgrad.graph.own_loss import own_loss
from taskgrad.graph.slices import as_tensors, batch_size
from taskgrad.layout import Layout, Select
from taskgrad.thunk import Thunk, collect, spawn
from taskgrad.train.data import MicrobatchSplitter, check_size, on_workers
from taskgrad.train.steps import Steps

# How many batches are in flight at a time where nothing is trained: the shards' work overlaps.
_IN_FLIGHT = 4


def _measure(
    functions: Mapping[str, Callable[..., Any]],
    dims: Any,
    size: int | None,
    output: Any,
    targets: Any,
) -> tuple[dict[str, float], int]:
    """The value of each function for a batch, and its number of samples.

    That is `size` where the targets do not say.
    """
    targets = as_tensors(targets)
    own = batch_size(targets, dims, "the targets")
    size = check_size(size if own is None else own, targets)
    found = {name: float(function(output, targets)) for name, function in functions.items()}
    return found, size


def _inputs_size(dims: Any, x: Any) -> int | None:
    try:
        return batch_size(as_tensors(x), dims, "the inputs")
    except ValueError:  # the targets may say
        return None


@dataclass(frozen=True)
class Loops:
    """A trainer's loops over loaders; it evaluates in evaluation mode, whatever the chain's is."""

    layout: Layout
    steps: Steps
    splitter: MicrobatchSplitter
    autocast: tuple[tuple[str, torch.dtype], ...]
    loss_fn: Callable[..., torch.Tensor]

    def evaluate(
        self, loader: Iterable[Any], metrics: Mapping[str, Callable[..., Any]]
    ) -> dict[str, float]:
        """The mean of the loss, which may be a sum over samples, and of each metric.

        Where the model computes the loss, metrics get the batch as their targets.
        """
        splitter, functions = self.splitter, {"loss": self.loss_fn, **metrics}
        form, loss_weight = splitter.form, splitter.loss_weight
        measure = partial(_measure, functions, None if form.own_loss else splitter.target_dims)
        count = partial(_inputs_size, splitter.in_dims)
        weights: list[float] = []

        def start(item: Any) -> Thunk:
            x, y = form.of_item(item, "the loader")
            x = form.inputs(x)
            form.check_trains(x, y)
            if loss_weight is not None:
                if on_workers(x) or on_workers(y):
                    splitter.refuse_weighing(x)
                weights.append(loss_weight.of(as_tensors(x), as_tensors(y)))
            size = spawn(count, x, worker=splitter.ends[0][0]) if on_workers(x) else count(x)
            if form.own_loss and metrics:
                y = x
            output = self._forward(x, own_loss if form.own_loss and not metrics else None)
            return spawn(measure, size, output, y, worker=output._node.worker)

        values: dict[str, list[float]] = {name: [] for name in functions}
        sizes: list[int] = []
        for found, size in self._stream(loader, start):
            sizes.append(size)
            for name, value in found.items():
                values[name].append(value)
        if not sizes:
            raise ValueError("the loader yielded no batches to evaluate on")
        if loss_weight is not None and not sum(weights):
            raise ValueError("loss_weight is 0 for every batch: there is nothing to evaluate on")
        return {
            name: _mean(of, weights or sizes, splitter.weighted)
            if name == "loss"
            else _mean(of, sizes, means=True)
            for name, of in values.items()
        }

    def predict(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Outputs for the batches of inputs, in order."""
        return self._stream(loader, self._forward)

    def _forward(self, x: Any, select: Select | None = None) -> Thunk:
        form = self.splitter.form
        x = form.inputs(x)
        args, kwargs = form.arguments(x if isinstance(x, Thunk) else as_tensors(x))
        calls = self.layout.calls(args, kwargs, mode=False, autocast=self.autocast, select=select)
        return Thunk(calls[-1], self.layout.session)

    def _stream(self, loader: Iterable[Any], start: Callable[[Any], Thunk]) -> Iterator[Any]:
        """Values of the thunks that are started for the items, in order, a few in flight."""
        with self.steps.idle():
            pass  # its errors come before anything is read from the loader
        running: deque[Thunk] = deque()
        items = iter(loader)
        while True:
            # Not around the yield: the caller is in its own grad mode there.
            with torch.no_grad():
                for item in itertools.islice(items, _IN_FLIGHT - len(running)):
                    with self.steps.idle():  # steps may have been taken meanwhile
                        running.append(start(item).persist())
                        self.steps.add_reader(running[-1]._node)
                if not running:
                    return
                value = collect(running[0])
            running.popleft()
            yield value


def _mean(values: list[float], sizes: Sequence[float], means: bool) -> float:
    """The mean over samples of what are means over the samples of each batch, or else sums.

    A batch of size 0 counts for nothing, whatever its value is.
    """
    total = sum(v * n if means else v for v, n in zip(values, sizes, strict=True) if n)
    return total / sum(sizes)
