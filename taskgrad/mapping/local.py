"""The backend of a map over threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from taskgrad.cluster.nested import current_worker
from taskgrad.graph import pack
from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.nodes import walk
from taskgrad.graph.pytree import flatten
from taskgrad.item_errors import is_ctrl_c, item_error
from taskgrad.mapping.closed_over import closed_over_tensors, title_of
from taskgrad.mapping.segments import (
    ItemError,
    ItemFunction,
    MapRecording,
    Results,
    Row,
    Segment,
    SegmentInput,
    cut,
    differentiate,
    join,
    run_segments,
    share,
    takes_gradient,
    total,
)
from taskgrad.mapping.threads import HERE
from taskgrad.worker.failures import backward_error
from taskgrad.worker_names import WorkerName


def map_local(
    fn: Callable[..., Any],
    rows: Sequence[Row],
    *,
    threads: int,
    chunksize: int | None,
    reduce: bool,
    seed: int | None,
) -> list[Any]:
    """The results, or their sums by chunk, attached to autograd's graph."""
    if chunksize is None:
        ranges = share(len(rows), [1] * min(threads, len(rows)))
    else:
        ranges = cut(len(rows), chunksize)
    taped = torch.is_grad_enabled()
    function, originals = _detached(fn) if taped else (fn, {})
    mapped = ItemFunction(function, taped, seed, reduce)
    parts = [_input(r.start, rows[r.start : r.stop]) for r in ranges]
    try:
        segments = run_segments(mapped, parts, threads)
    except ItemError as failed:
        error, index = failed.error, failed.index
    else:
        return _attach(fn, segments, parts, originals, threads)
    raise item_error(error, index, fn, _where())


def _where() -> WorkerName:
    worker = current_worker()
    return WorkerName(worker.address, worker.name) if worker else HERE


def _input(start: int, rows: Sequence[Row]) -> SegmentInput:
    def has_history(leaf: Any) -> bool:
        # In its place threads need a leaf of their own; other objects are given themselves.
        return isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf

    leaves, structure = flatten(list(rows), has_history)
    return SegmentInput(start, leaves, structure, list(map(takes_gradient, leaves)))


def _attach(
    fn: Callable[..., Any],
    segments: list[Segment],
    parts: Sequence[SegmentInput],
    originals: dict[int, torch.Tensor],
    threads: int,
) -> list[Any]:
    taken = {id(t) for segment in segments for t in segment.taken}
    behind = _leaves_behind(o for segment in segments for o in segment.outputs)
    shared = [t for t in behind if id(t) not in taken]
    for segment in segments:
        segment.shared = shared
    inputs = [originals.get(id(t), t) for t in shared]
    inputs += [t for p in parts for t, wanted in zip(p.leaves, p.wanted, strict=True) if wanted]
    return _joined(title_of(fn), segments, inputs, threads, retains=False)


def _joined(
    title: str, segments: list[Segment], inputs: list[Any], threads: int, *, retains: bool
) -> list[Any]:
    """The results of segments, as functions of these inputs in the caller's autograd graph."""
    results = Results.joined(segment.results for segment in segments)
    recording = LocalRecording(title, results.entries, segments, threads, retains)
    return join(recording, results, [o for s in segments for o in s.outputs], inputs)


def _detached(fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[int, torch.Tensor]]:
    """The function, detached from the autograd graph behind the tensors that it closes over.

    Otherwise the backward of each segment would go through that graph, and call a tensor's hooks.
    Tensors with a history or hooks are replaced, in a copy of the function, by leaves; returned
    with it are the originals by the leaves' identities.
    """
    if all(t.is_leaf and not t._backward_hooks for t in closed_over_tensors(fn)):
        return fn, {}
    packed = pack.pack(fn)
    values = [t.detach().requires_grad_() if t.requires_grad else t for t in packed.tensors]
    pairs = zip(values, packed.tensors, strict=True)
    originals = {id(leaf): tensor for leaf, tensor in pairs if tensor.requires_grad}
    return pack.unpack(packed.data, values, own=False), originals


def _leaves_behind(outputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves of autograd's graph behind these tensors, each once."""
    outputs = list(outputs)
    found = {id(output): output for output in outputs if output.grad_fn is None}
    starts: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    for node in walk(starts, lambda node: [n for n, _ in node.next_functions if n is not None]):
        if hasattr(node, "variable"):  # it accumulates into a leaf
            found.setdefault(id(node.variable), node.variable)
    return list(found.values())


class LocalRecording(MapRecording):
    """Segments in this process. Inputs: the closed-over tensors, then those of each one's items.

    A second derivative goes through the graphs of the first, too: with `retains` they are kept.
    """

    def __init__(
        self,
        title: str,
        entries: Sequence[int],
        segments: Sequence[Segment],
        threads: int,
        retains: bool,
    ) -> None:
        super().__init__(title, entries)
        self.segments = segments
        self.threads = threads
        self.retains = retains

    def backward(self, cotangents: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Gradients from the segments' graphs, each in a thread."""
        self.claim(cotangents, retain)
        shared, taken = self._differentiate(
            self._by_segment(cotangents), retain=retain or self.retains
        )
        return [*total(shared), *(grad for grads in taken for grad in grads)]

    def differentiable(
        self, inputs: Sequence[torch.Tensor], cotangents: Sequence[Gradient]
    ) -> list[Gradient]:
        """The backward, recorded as segments of another map."""
        self.claim(cotangents, True)
        self.retains = True
        given = self._by_segment(cotangents)
        seeds = [[None if c is None else c.detach().requires_grad_() for c in cs] for cs in given]
        found = self._differentiate(seeds, retain=True, create=True)
        segments, joined = [], list(inputs[: len(self.segments[0].shared)])
        rest = iter(inputs[len(joined) :])
        for segment, cs, ss, shared, taken in zip(self.segments, given, seeds, *found, strict=True):
            gradients = [*shared, *taken]
            flags = [g is not None and g.requires_grad for g in gradients]
            outputs = [g for g in gradients if g is not None and g.requires_grad]
            leaves = [None if flag else g for g, flag in zip(gradients, flags, strict=True)]
            results = Results(leaves, [flatten(gradients)[1]], flags, [0] * len(outputs))
            takers = [*segment.taken, *(s for s in ss if s is not None)]
            segments.append(Segment(results, takers, outputs, segment.shared))
            joined += [next(rest) for _ in segment.taken]
            joined += [c for c in cs if c is not None]
        title = f"the backward of {self.title}"
        gradients = _joined(title, segments, joined, self.threads, retains=True)
        count = len(self.segments[0].shared)
        return [
            *total([grads[:count] for grads in gradients]),
            *(grad for grads in gradients for grad in grads[count:]),
        ]

    def _differentiate(self, seeds: Sequence[Sequence[Gradient]], **kwargs: bool) -> Any:
        try:
            return differentiate(self.segments, seeds, self.threads, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            raise backward_error(error, _where(), self.title, None) from error

    def _by_segment(self, cotangents: Sequence[Gradient]) -> list[list[Gradient]]:
        rest = iter(cotangents)
        return [[next(rest) for _ in segment.outputs] for segment in self.segments]
