"""Outputs of a `pmap` that stay on the workers where its ranks ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.part_calls import Values, run_parts
from taskgrad.executors.rank_calls import run_ranks
from taskgrad.graph.calls import Call
from taskgrad.graph.parts import PartCall, PartView
from taskgrad.graph.pytree import describe
from taskgrad.spmd.axes import OutAxis
from taskgrad.spmd.joining import axes_of, join
from taskgrad.spmd.sharded.layout import Parts, Sharded, Span
from taskgrad.spmd.sharded.running import call, held
from taskgrad.spmd.sharded.tensor import ShardedTensor
from taskgrad.worker import tensor_parts
from taskgrad.worker.parts import KeptOutput, TensorInfo

Run = tuple[Span, range]
"""A worker, and neighbouring ranks that it ran."""


def refuse_gradients(what: str, calls: Sequence[Call]) -> None:
    """Raise TaskgradError if a gradient could flow through calls whose results stay."""
    if any(one.needs_grad for one in calls):
        raise TaskgradError(
            f"{what}: an argument, or what the function closes over, takes a gradient, and a "
            "result is to stay on the workers, which carries none to the driver. Take gradients "
            "inside (torch.func.grad), or call it under torch.no_grad()"
        )


def staying_outputs(what: str, out_axes: Any, calls: Sequence[Call], owner: Session) -> Any:
    """Run the ranks; returns their outputs as one value, those that stay as sharded tensors.

    Raises ValueError and TypeError as `together` does; TaskgradError if a gradient would be lost.
    """
    refuse_gradients(what, calls)
    found: list[KeptOutput] = run_ranks(owner, calls)
    trees = [(list(map(_meta, output.leaves)), output.structure) for output in found]
    axes = axes_of(what, trees, out_axes)
    _refuse_sparse(what, found, axes)
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    leaves = [
        _leaf(what, i, column, axis)
        for i, (column, axis) in enumerate(zip(columns, axes, strict=True))
    ]
    runs = _runs(calls, owner)
    made = {
        leaf.position: _calls(leaf, runs, calls)
        for leaf in leaves
        if isinstance(leaf, _Leaf) and leaf.stays
    }
    reports = _Reports(what, [leaf for leaf in leaves if isinstance(leaf, _Leaf)], runs, calls)
    to_run = [*reports.calls, *(one for those in made.values() for one in those)]
    reports.read(run_parts(owner, to_run))
    built = []
    for leaf in leaves:
        if not isinstance(leaf, _Leaf):
            built.append(leaf)
        elif not leaf.stays:
            built.append(join(reports.values[leaf.position], leaf.axis, what))
        else:
            spans = _spans(leaf, runs)
            parts = held(owner, spans, made[leaf.position])
            shape, dtype = leaf.whole.shape, leaf.whole.dtype
            built.append(ShardedTensor(Parts(owner, shape, dtype, leaf.axis, tuple(parts))))
    return trees[0][1].build(built)


def _meta(leaf: Any) -> Any:
    """A tensor without values for the description of one."""
    if not isinstance(leaf, TensorInfo):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")


def _refuse_sparse(what: str, found: Sequence[KeptOutput], axes: Sequence[OutAxis]) -> None:
    for output in found:
        for leaf, axis in zip(output.leaves, axes, strict=True):
            dense = not isinstance(leaf, TensorInfo) or leaf.layout is torch.strided
            if isinstance(axis, Sharded) and not dense:
                raise TypeError(
                    f"{what}: an output that is to stay on the workers is {leaf.layout}: return "
                    "a dense tensor, .to_dense()"
                )


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the result that is made of what is on the workers.

    `axis` is that of the ranks in the whole, which has no values here; with None all ranks have
    the same.
    """

    position: int
    axis: int | None
    whole: torch.Tensor
    stays: bool


def _leaf(what: str, position: int, column: Sequence[Any], axis: OutAxis) -> Any:
    """A leaf of the result, given the ranks'; itself if all that it takes is here."""
    stays = isinstance(axis, Sharded)
    along = axis.axis if isinstance(axis, Sharded) else axis
    tensors = [isinstance(value, torch.Tensor) for value in column]
    if along is None:
        if not all(tensors):
            return join(column, None, what)
        join(column, 0, what)  # raises unless they are alike
        return _Leaf(position, None, column[0], stays)
    whole = join(column, along, what)
    if whole is None or not (stays or all(tensors)):
        return whole
    return _Leaf(position, along % whole.ndim, whole, stays)


def _runs(calls: Sequence[Call], owner: Session) -> list[Run]:
    grouped = groupby(range(len(calls)), key=lambda rank: calls[rank].worker)
    found = []
    for worker, group in grouped:
        first, count = next(group), 1 + sum(1 for _ in group)
        span = Span(owner.named(str(worker)), first, first + count)
        found.append((span, range(first, first + count)))
    return found


def _spans(leaf: _Leaf, runs: Sequence[Run]) -> list[Span]:
    """Who holds what of a leaf that stays."""
    if leaf.axis is not None:
        return [span for span, _ in runs]
    return [Span(worker) for worker in dict.fromkeys(span.worker for span, _ in runs)]


def _calls(leaf: _Leaf, runs: Sequence[Run], calls: Sequence[Call]) -> list[PartCall]:
    """The calls that make the parts of a leaf that stays."""
    if leaf.axis is None:
        firsts = {span.worker: ranks[0] for span, ranks in reversed(runs)}
        return [
            call(
                tensor_parts.copy,
                span,
                [PartView(calls[firsts[span.worker]], leaf.position)],
                title="copy",
            )
            for span in _spans(leaf, runs)
        ]
    return [
        call(
            tensor_parts.stack,
            span,
            [PartView(calls[rank], leaf.position) for rank in ranks],
            title="stack",
            axis=leaf.axis,
        )
        for span, ranks in runs
    ]


class _Reports:
    """What the driver gets: leaves that come home, and digests of those that all ranks share.

    `values` has the former by position: of all ranks, or of rank 0 if it is the same on all.
    """

    def __init__(
        self, what: str, leaves: Sequence[_Leaf], runs: Sequence[Run], calls: Sequence[Call]
    ) -> None:
        self.values: dict[int, list[Any]] = {leaf.position: [] for leaf in leaves}
        self._what = what
        self._shared = [leaf for leaf in leaves if leaf.axis is None]
        self._given = []
        self.calls = []
        for span, ranks in runs:
            given = [
                (leaf.position, rank)
                for leaf in leaves
                for rank in ranks
                if not leaf.stays and (rank == 0 or leaf.axis is not None)
            ]
            compared = [(leaf.position, rank) for leaf in self._shared for rank in ranks]
            if given or compared:
                self._given.append(given)
                views = [PartView(calls[rank], position) for position, rank in given + compared]
                self.calls.append(
                    call(
                        tensor_parts.report,
                        span,
                        views,
                        title="report",
                        stays=False,
                        given=len(given),
                        ranks=len(ranks),
                    )
                )

    def read(self, values: Values) -> None:
        """Take what the workers report; ValueError if ranks differ where they may not."""
        digests: list[list[bytes]] = [[] for _ in self._shared]
        reported = values(self.calls)
        for given, (found, compared) in zip(self._given, reported, strict=True):
            for (position, _), value in zip(given, found, strict=True):
                self.values[position].append(value)
            for of_leaf, more in zip(digests, compared, strict=True):
                of_leaf += more
        for leaf, of_ranks in zip(self._shared, digests, strict=True):
            for rank, digest in enumerate(of_ranks):
                if digest != of_ranks[0]:
                    axis = "tg.Sharded(0)" if leaf.stays else "0"
                    raise ValueError(
                        f"{self._what}: an output with out_axes None is not the same on all ranks: "
                        f"ranks 0 and {rank} gave {describe(leaf.whole)} with other values. Reduce "
                        f"it (tg.psum, tg.pmean) or give it an axis: {axis}"
                    )
