"""Outputs of a `pmap` that stay on the workers where its ranks ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.rank_calls import run_tasks
from taskgrad.graph.calls import Call
from taskgrad.graph.parts import PartCall, PartView
from taskgrad.graph.pytree import describe
from taskgrad.spmd.axes import OutAxis
from taskgrad.spmd.joining import axes_of, join
from taskgrad.spmd.sharded.layout import Parts, Sharded, Span
from taskgrad.spmd.sharded.running import call, kept, run, values
from taskgrad.spmd.sharded.tensor import ShardedTensor
from taskgrad.worker import tensor_parts
from taskgrad.worker.parts import KeptOutput, TensorInfo
from taskgrad.worker_names import WorkerName


def staying_outputs(what: str, out_axes: Any, calls: Sequence[Call], owner: Session) -> Any:
    """Run the ranks; returns their outputs as one value, those that stay as sharded tensors.

    Raises ValueError and TypeError as `together` does; TaskgradError if a gradient would be lost.
    """
    if any(one.needs_grad for one in calls):
        raise TaskgradError(
            f"{what}: an argument, or what the function closes over, takes a gradient, and a "
            "result is to stay on the workers, which carries none to the driver. Take gradients "
            "inside (torch.func.grad), or call it under torch.no_grad()"
        )
    found: list[KeptOutput] = run_tasks(owner, calls)
    trees = [(list(map(_meta, output.leaves)), output.structure) for output in found]
    axes = axes_of(what, trees, out_axes)
    ranks = _Ranks(what, calls, [owner.named(str(one.worker)) for one in calls], owner)
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    _refuse_sparse(what, found, axes)
    leaves = [
        _leaf(ranks, i, column, axis)
        for i, (column, axis) in enumerate(zip(columns, axes, strict=True))
    ]
    run(owner, [made for leaf in leaves if isinstance(leaf, _Leaf) for made in leaf.calls])
    built = [leaf.value(ranks) if isinstance(leaf, _Leaf) else leaf for leaf in leaves]
    return trees[0][1].build(built)


def _refuse_sparse(what: str, found: Sequence[KeptOutput], axes: Sequence[OutAxis]) -> None:
    for output in found:
        for leaf, axis in zip(output.leaves, axes, strict=True):
            dense = not isinstance(leaf, TensorInfo) or leaf.layout is torch.strided
            if isinstance(axis, Sharded) and not dense:
                raise TypeError(
                    f"{what}: an output that is to stay on the workers is {leaf.layout}: return "
                    "a dense tensor, .to_dense()"
                )


def _meta(leaf: Any) -> Any:
    """A tensor without values for the description of one."""
    if not isinstance(leaf, TensorInfo):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")


@dataclass(frozen=True)
class _Ranks:
    """The calls of the ranks, which have run, and their workers."""

    what: str
    calls: Sequence[Call]
    workers: Sequence[WorkerName]
    owner: Session

    def view(self, rank: int, position: int) -> PartView:
        """A leaf of a rank's output, as an input of a call on its worker."""
        return PartView(self.calls[rank], position)

    def read(self, rank: int, position: int, function: Any) -> PartCall:
        """A call that gives the driver a function of a leaf of a rank's output."""
        inputs = [self.view(rank, position)]
        return call(function, Span(self.workers[rank]), inputs, title="read", stays=False)

    def runs(self) -> list[tuple[Span, list[int]]]:
        """The ranks, in runs on one worker."""
        grouped = groupby(range(len(self.calls)), key=lambda rank: self.workers[rank])
        runs = [(worker, list(ranks)) for worker, ranks in grouped]
        return [(Span(worker, ranks[0], ranks[-1] + 1), ranks) for worker, ranks in runs]


def _leaf(ranks: _Ranks, position: int, column: Sequence[Any], axis: OutAxis) -> Any:
    """One leaf of the result: what makes it, or itself if all that it takes is here."""
    tensors = any(isinstance(value, torch.Tensor) for value in column)
    if not isinstance(axis, Sharded):
        if not tensors:
            return join(column, axis, ranks.what)
        return _Gathered(ranks, position, column, axis)
    if axis.axis is None:
        return _Copied(ranks, position, column) if tensors else join(column, None, ranks.what)
    whole = join(column, axis.axis, ranks.what)
    return None if whole is None else _Stacked(ranks, position, whole, axis.axis)


class _Leaf:
    """A leaf of the result, and the calls that have to run for it."""

    calls: list[PartCall]

    def value(self, ranks: _Ranks) -> Any:
        """The leaf, once the calls have run."""
        raise NotImplementedError


class _Gathered(_Leaf):
    """A leaf that comes to the driver."""

    def __init__(
        self, ranks: _Ranks, position: int, column: Sequence[Any], axis: int | None
    ) -> None:
        self._column, self._axis = column, axis
        self._at = [i for i, value in enumerate(column) if isinstance(value, torch.Tensor)]
        self.calls = [ranks.read(rank, position, tensor_parts.give) for rank in self._at]

    def value(self, ranks: _Ranks) -> torch.Tensor:
        found = list(self._column)
        for rank, value in zip(self._at, values(ranks.owner, self.calls), strict=True):
            found[rank] = value
        joined: torch.Tensor = join(found, self._axis, ranks.what)
        return joined


class _Stacked(_Leaf):
    """A leaf that stays, stacked: each worker has that of its ranks."""

    def __init__(self, ranks: _Ranks, position: int, whole: torch.Tensor, axis: int) -> None:
        self._whole, self._axis = whole, axis % whole.ndim
        self._runs = ranks.runs()
        self.calls = [
            call(
                tensor_parts.stack,
                span,
                [ranks.view(rank, position) for rank in those],
                title="stack",
                axis=self._axis,
            )
            for span, those in self._runs
        ]

    def value(self, ranks: _Ranks) -> ShardedTensor:
        parts = kept(ranks.owner, [span for span, _ in self._runs], self.calls)
        shape, dtype = self._whole.shape, self._whole.dtype
        return ShardedTensor(Parts(ranks.owner, shape, dtype, self._axis, tuple(parts)))


class _Copied(_Leaf):
    """A leaf that stays, the same on all ranks: each worker has one copy."""

    def __init__(self, ranks: _Ranks, position: int, column: Sequence[Any]) -> None:
        join(column, 0, ranks.what)  # raises unless they are tensors alike
        self._first = column[0]
        self._spans = [Span(worker) for worker in dict.fromkeys(ranks.workers)]
        firsts = [ranks.workers.index(span.worker) for span in self._spans]
        self._copies = [
            call(tensor_parts.copy, span, [ranks.view(rank, position)], title="copy")
            for span, rank in zip(self._spans, firsts, strict=True)
        ]
        self._digests = [
            ranks.read(rank, position, tensor_parts.digest) for rank in range(len(column))
        ]
        self.calls = [*self._copies, *self._digests]

    def value(self, ranks: _Ranks) -> ShardedTensor:
        found = values(ranks.owner, self._digests)
        for rank, digest in enumerate(found):
            if digest != found[0]:
                raise ValueError(
                    f"{ranks.what}: an output that stays as copies is not the same on all ranks: "
                    f"ranks 0 and {rank} gave {describe(self._first)} with other values. Reduce "
                    "it (tg.psum, tg.pmean) or give it an axis: tg.Sharded(0)"
                )
        parts = kept(ranks.owner, self._spans, self._copies)
        shape, dtype = self._first.shape, self._first.dtype
        return ShardedTensor(Parts(ranks.owner, shape, dtype, None, tuple(parts)))
