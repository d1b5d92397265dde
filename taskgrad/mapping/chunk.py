"""Chunks of a map: what a worker runs as one call, what comes back of it, and its backward.

A chunk is a `Call` of `run_items`, so its worker keeps a tape of it as of any other call. That tape
holds the chunk's segments, each with an autograd graph of its own. The backward is one task a
worker, the pullback of all its chunks: a pullback each would be as many tasks, could not spread the
segments of all chunks over the worker's threads, and would add up gradients of closed-over tensors
in another order, to other bits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import get_worker

from taskgrad.cluster.worker_plugin import store_of
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.lowering import action_of
from taskgrad.graph import pack
from taskgrad.graph.calls import Call
from taskgrad.graph.copies import own_copy
from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.functions import template
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, Sum, new_key
from taskgrad.graph.objects import Opaque
from taskgrad.graph.pullback import Pullback
from taskgrad.graph.pytree import Slot, sequence
from taskgrad.graph.torch_settings import thread_settings
from taskgrad.item_errors import portable
from taskgrad.mapping.eager import EagerGradients, EagerOptions, differentiate_eagerly
from taskgrad.mapping.segments import (
    ItemError,
    ItemFunction,
    Results,
    Segment,
    SegmentInput,
    differentiate,
    on_host,
    run_segments,
    share,
    total,
)
from taskgrad.mapping.threads import threads_here
from taskgrad.worker.failures import backward_error
from taskgrad.worker.settings import in_thread
from taskgrad.worker.store import Store
from taskgrad.worker.tape import Tape

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MapSpec(Opaque):
    """What all chunks of a map have in common.

    With `threads` a chunk is run by as many threads as its worker has; `taped`, `seed` and `reduce`
    are those of `ItemFunction`; `wanted` and `is_buffer` mark the closed-over tensors that take a
    gradient, and those that are buffers of modules.
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
    """What a chunk returns besides its outputs; the segments stay in the worker's process.

    `attempt` is the id of this execution: a chunk that is run again after a worker was lost gets
    another one, so that a tape that does not fit the results is rejected.
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


class Shared(Sum):
    """A leaf's value as the result of a task (a sum of one), which chunks on one worker take."""

    __slots__ = ()

    @property
    def needs_grad(self) -> bool:
        return self.inputs[0].needs_grad


class Chunk(Call):
    """The call of a chunk, items `rows` of a map.

    `shared` has the function's bytes and what it closes over; `items` the items' bytes and their
    tensors, `taken` of which take a gradient.
    """

    __slots__ = ("rows", "taken")

    def __init__(
        self, spec: MapSpec, rows: range, shared: Node, items: Node, taken: int, worker: str
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

    Raises ItemError if an item raised, TaskgradError if the function changed a module's buffer.
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
    if store.worker.address.startswith(
        "inproc:"
    ):  # nothing is pickled, and the driver may write there
        results.leaves = own_copy(results.leaves)
    result = ChunkResult(uuid.uuid4().hex, results, segments, None)
    if spec.taped:
        takers = [t for t, wanted in zip(leaves, spec.wanted, strict=True) if wanted]
        for segment in segments:
            segment.shared = takers
        # A backward comes after the region of autocast that the map may be in.
        with in_thread(thread_settings().outside_autocast(), store.worker):
            result.eager = differentiate_eagerly(
                segments, spec.eager, seconds, threads, spec.title, store.worker
            )
    return [output for segment in segments for output in segment.outputs], result


def _by_thread(items: list[Any], start: int, threads: int) -> list[SegmentInput]:
    data, *tensors = items
    leaves, structure, wanted = pack.loads_plain(data)
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


class ChunksPullback(Pullback):
    """The pullback of chunks on one worker; `given` are the cotangents of their outputs, in order.

    Its value: the gradients of the closed-over tensors, summed, and for each chunk those of its
    items' tensors, or None for a chunk without cotangents. With `threads` it runs in as many
    threads as the worker has.
    """

    __slots__ = ("chunks", "results", "runs", "threads")

    def __init__(
        self,
        chunks: Sequence[Chunk],
        results: Sequence[ChunkResult],
        given: Sequence[Gradient],
        retain: bool,
        threads: bool,
    ) -> None:
        self.runs, distinct = encode(given)
        super().__init__(chunks[0], [Leaf(distinct, needs_grad=False)], (), retain)
        self.chunks = tuple(chunks)
        self.results = tuple((r.attempt, len(r.results.entries)) for r in results)
        self.threads = threads


@dataclass(frozen=True)
class PullBackChunks:
    """Run a `ChunksPullback`; `chunks` has the key, attempt and number of outputs of each."""

    chunks: tuple[tuple[str, str, int], ...]
    runs: Runs
    title: str
    threads: bool
    retain: bool

    def run(
        self, store: Store, distinct: list[torch.Tensor]
    ) -> tuple[list[Gradient], list[list[Gradient] | None]]:
        """The gradients.

        Raises LayerError if autograd raised; WorkerLostError if a tape is not here or is of another
        attempt, as the worker was restarted.
        """
        cotangents = iter(decode(self.runs, distinct))
        used: dict[str, Sequence[Segment]] = {}
        seeds: list[list[Gradient]] = []
        with contextlib.ExitStack() as locks:
            for key, attempt, count in self.chunks:
                given = [next(cotangents) for _ in range(count)]
                if any(c is not None for c in given):
                    tape, used[key] = _taped(store, key, attempt, self.title)
                    locks.enter_context(tape.lock)
                    rest = iter(given)
                    seeds += [[next(rest) for _ in segment.outputs] for segment in used[key]]
            segments = [segment for taped in used.values() for segment in taped]
            threads = threads_here() if self.threads else 1
            try:
                shared, taken = differentiate(segments, seeds, threads, retain=self.retain)
            except BaseException as error:
                raise backward_error(error, store.worker, self.title, None) from error
        by_segment = iter(taken)
        items = {
            key: [on_host(g) for _ in taped for g in next(by_segment)]
            for key, taped in used.items()
        }
        return list(map(on_host, total(shared))), [items.get(key) for key, _, _ in self.chunks]


def _taped(store: Store, key: str, attempt: str, title: str) -> tuple[Tape, Sequence[Segment]]:
    tape = store.get(key)
    result = tape.outputs[-1] if isinstance(tape, Tape) else None
    # Another attempt may have drawn other random numbers: the results are not of its tape.
    if not isinstance(tape, Tape) or result is None or result.attempt != attempt:
        raise WorkerLostError(
            f"worker {store.worker} does not hold what the map of {title!r} left there: "
            "it was restarted since. Run the map again"
        )
    return tape, result.segments


@action_of.register
def _(node: ChunksPullback) -> PullBackChunks:
    chunks = zip(node.chunks, node.results, strict=True)
    return PullBackChunks(
        tuple((chunk.key, *result) for chunk, result in chunks),
        *(node.runs, node.call.title, node.threads, node.retain),
    )


def encode(cotangents: Sequence[Gradient]) -> tuple[Runs, list[torch.Tensor]]:
    """Cotangents as (position, count) of runs of equal ones (-1: None), and the distinct ones.

    The losses of a sum all have the same cotangent: a backward of a thousand items sends as much as
    that of one.
    """
    distinct: dict[Any, int] = {}
    tensors: list[torch.Tensor] = []
    positions = []
    for cotangent in cotangents:
        if cotangent is None:
            positions.append(-1)
            continue
        key: Any = id(cotangent)
        if not cotangent.dim() and cotangent.layout is torch.strided and cotangent.is_cpu:
            # Numbers that are equal to the bit are the same.
            bits = cotangent.detach().resolve_conj().resolve_neg().reshape(1).view(torch.uint8)
            key = cotangent.dtype, bytes(bits.tolist())
        if key not in distinct:
            distinct[key] = len(tensors)
            tensors.append(cotangent)
        positions.append(distinct[key])
    return tuple((p, len(list(run))) for p, run in itertools.groupby(positions)), tensors


def decode(runs: Runs, tensors: Sequence[torch.Tensor]) -> list[Gradient]:
    """Inverse of `encode`."""
    return [None if at < 0 else tensors[at] for at, count in runs for _ in range(count)]
