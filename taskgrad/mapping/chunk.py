"""A chunk of a map: what a worker runs as one call, and what comes back of it.

A chunk is a `Call` of `run_items`, so its worker keeps a tape of it as of any other call. That tape
holds the chunk's segments: each thread's items with an autograd graph of their own, so that their
backward runs in as many threads (`taskgrad.mapping.backward`).
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import get_worker

from taskgrad.cluster.worker_plugin import store_of
from taskgrad.errors import TaskgradError
from taskgrad.executors.lowering import action_of
from taskgrad.graph import pack
from taskgrad.graph.calls import Call
from taskgrad.graph.copies import own_copy
from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.objects import Opaque
from taskgrad.graph.pytree import Slot, sequence
from taskgrad.graph.templates import template
from taskgrad.graph.torch_settings import thread_settings
from taskgrad.item_errors import portable
from taskgrad.mapping.eager import EagerGradients, EagerOptions, differentiate_eagerly
from taskgrad.mapping.items import share
from taskgrad.mapping.segments import (
    ItemError,
    ItemFunction,
    Results,
    Segment,
    SegmentInput,
    on_host,
    run_segments,
    total,
)
from taskgrad.mapping.threads import threads_here
from taskgrad.worker.actions import Add
from taskgrad.worker.settings import in_thread


@dataclass(frozen=True)
class MapSpec(Opaque):
    """What all chunks of a map have in common.

    `threads` says whether a chunk is run by as many threads as its worker has; `taped`, `seed` and
    `reduce` are those of `ItemFunction`; `wanted` and `is_buffer` say which of the closed-over
    tensors take a gradient, and which are buffers of modules.
    """

    title: str
    threads: bool
    taped: bool
    seed: int | None
    reduce: bool
    wanted: tuple[bool, ...]
    is_buffer: tuple[bool, ...]
    eager: EagerOptions


@dataclass
class ChunkResult(Opaque):
    """What comes back of a chunk, beside the outputs.

    `attempt` is the id of this execution: a chunk that is run again after a worker was lost gets
    another one, so that a tape that does not fit the results is rejected. The segments, with their
    autograd graphs, stay in the worker's process.
    """

    attempt: str
    results: Results
    segments: Sequence[Segment]
    eager: EagerGradients | None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"segments": ()}


ChunkValue = tuple[list[torch.Tensor], ChunkResult]
"""The outputs, and the rest."""


@functools.cache
def _packed(fn: Callable[..., Any]) -> bytes:
    return pack.pack(fn).data


class Shared(Node):
    """A leaf's value as the result of a task, which several chunks on one worker take."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Leaf, worker: str) -> None:
        super().__init__(new_key("shared"), worker)
        self.leaf = leaf

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.leaf,)

    @property
    def needs_grad(self) -> bool:
        return self.leaf.needs_grad


@action_of.register
def _(node: Shared) -> Add:
    return Add()  # of one value: the value


class Chunk(Call):
    """The call of a chunk, items `rows` of a map.

    Parameters
    ----------
    shared
        The function's bytes and what it closes over.
    items
        The items' bytes and their tensors, of which so many are `taken`: they take a gradient.
    """

    __slots__ = ("rows", "taken")

    def __init__(
        self,
        spec: MapSpec,
        rows: range,
        shared: Node,
        items: Node,
        taken: int,
        worker: str,
    ) -> None:
        super().__init__(
            title=spec.title,
            steps=((0, spec.title, "map"),),
            inputs=(shared, items),
            template=template(((Slot(0), Slot(1), spec, rows.start), {})),
            function=_packed(run_items),
            worker=worker,
            key=new_key("map", spec.title),
            raw=True,
        )
        self.rows = rows
        self.taken = taken

    @property
    def label(self) -> str:
        return f"items {self.rows[0]} to {self.rows[-1]} of the map of {self.title!r}"


def run_items(shared: list[Any], items: list[Any], spec: MapSpec, start: int) -> ChunkValue:
    """Run the items of a chunk, and where it pays their backward.

    Raises
    ------
    ItemError
        An item raised.
    TaskgradError
        The function changed a buffer of a module.
    """
    worker: Any = get_worker()
    store, key = store_of(worker), worker.get_current_task()
    data, *tensors = shared
    leaves = [
        t.detach().requires_grad_() if wanted and spec.taped else t.clone() if buffer else t
        for t, wanted, buffer in zip(tensors, spec.wanted, spec.is_buffer, strict=True)
    ]
    fn = pack.unpack(data, leaves, own=False)
    function = ItemFunction(fn, spec.taped, spec.seed, spec.reduce, leaves)
    threads = threads_here() if spec.threads else 1
    parts = _by_thread(items, start, threads)
    began = time.perf_counter()
    try:
        segments = run_segments(function, parts, threads, lambda: not store.is_released(key))
    except ItemError as failed:
        raise ItemError(failed.index, portable(failed.error), failed.frames) from None
    seconds = time.perf_counter() - began
    _check_buffers(spec, tensors, leaves)
    results = Results.joined(segment.results for segment in segments)
    results.leaves = list(map(on_host, results.leaves))
    if store.address.startswith("inproc:"):  # nothing is pickled, and the driver may write there
        results.leaves = own_copy(results.leaves)
    result = ChunkResult(uuid.uuid4().hex, results, segments, None)
    if spec.taped:
        takers = [t for t, wanted in zip(leaves, spec.wanted, strict=True) if wanted]
        for segment in segments:
            segment.shared = takers
        # A backward comes after the region of autocast that the map may be in.
        with in_thread(thread_settings().outside_autocast(), store.address):
            result.eager = differentiate_eagerly(
                segments, spec.eager, seconds, threads, spec.title, store.address
            )
    return [output for segment in segments for output in segment.outputs], result


def _by_thread(items: list[Any], start: int, threads: int) -> list[SegmentInput]:
    data, *tensors = items
    leaves, structure, wanted = pack.loads_arguments(data)
    filled = [tensors[x.index] if type(x) is Slot else x for x in leaves]
    flags = [type(x) is Slot and wanted[x.index] for x in leaves]
    rows = structure.children
    parts, before = [], 0
    for r in share(len(rows), [1] * min(threads, len(rows))):
        mine = sequence(rows[r.start : r.stop])
        at = slice(before, before + mine.count)
        parts.append(SegmentInput(start + r.start, filled[at], mine, flags[at], copied=True))
        before += mine.count
    return parts


def _check_buffers(
    spec: MapSpec, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> None:
    for old, new, is_buffer in zip(before, after, spec.is_buffer, strict=True):
        if is_buffer and not torch.equal(old, new.to(old.device)):
            raise TaskgradError(
                f"{spec.title!r} changed a buffer of a module that it closes over (batch "
                "norm in training mode?): each chunk has a copy of its own, and yours would "
                'not change. Put the module in evaluation mode, or use over="threads"'
            )


def sum_on_worker(chunks: Sequence[Chunk]) -> Call:
    """A call that takes the chunks on one worker, and sums their eager gradients there."""
    title = chunks[0].title
    with torch.no_grad():  # it leaves no tape
        return Call(
            title=title,
            steps=((0, title, "sum"),),
            inputs=chunks,
            template=template((tuple(map(Slot, range(len(chunks)))), {})),
            function=_packed(_with_sum),
            worker=chunks[0].worker,
            key=new_key("grad", title),
            raw=True,
        )


def _with_sum(*values: ChunkValue) -> tuple[list[ChunkValue], list[Gradient] | None]:
    """The values, and the sum of their gradients by closed-over tensor.

    None if one of them was not differentiated eagerly.
    """
    found = [r.eager.shared for _, r in values if r.eager and r.eager.shared is not None]
    plain = [
        (outputs, replace(r, segments=(), eager=r.eager and r.eager._replace(shared=None)))
        for outputs, r in values
    ]
    return plain, total(found) if len(found) == len(values) else None
