"""The backend of a map over worker processes: chunks as calls, in the driver's autograd graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from distributed import Client

from taskgrad.cluster.session import Session, WorkerInfo, session
from taskgrad.errors import LayerError, TaskgradError
from taskgrad.executors.base import Executor
from taskgrad.executors.registry import executor_of
from taskgrad.graph.calls import Call
from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pack import pickle_or_explain
from taskgrad.graph.pytree import Slot, flatten
from taskgrad.graph.torch_settings import settings_now
from taskgrad.item_errors import item_error
from taskgrad.mapping.chunk import (
    Chunk,
    ChunkResult,
    ChunksPullback,
    MapSpec,
    Shared,
    sum_on_worker,
)
from taskgrad.mapping.closed_over import pack_mapped, title_of
from taskgrad.mapping.eager import BackwardPredictor, EagerOptions
from taskgrad.mapping.segments import (
    ItemError,
    MapRecording,
    Results,
    Row,
    cut,
    join,
    share,
    takes_gradient,
    total,
)


def map_remote(
    fn: Callable[..., Any],
    rows: Sequence[Row],
    *,
    threads: bool,
    chunksize: int | None,
    reduce: bool,
    seed: int | None,
    eager: bool | None,
    eager_seed: float,
    client: Client | None,
) -> list[Any]:
    """The results, or their sums by chunk, attached to autograd's graph."""
    packed = pack_mapped(fn)
    title = title_of(fn)
    wanted = list(map(takes_gradient, packed.tensors))
    owner = session(client)
    placed = _placed(len(rows), owner.workers(), threads, chunksize)
    items = [[_ChunkItems(rows, r) for r in ranges] for ranges, _ in placed]
    takers = [t for t, w in zip(packed.tensors, wanted, strict=True) if w]
    takers += [t for some in items for chunk in some for t in chunk.takers]
    taped = torch.is_grad_enabled() and bool(takers)
    predictor = BackwardPredictor(fn) if taped and eager is None else None
    predicted = None if predictor is None else predictor.cotangent
    spec = MapSpec(
        title=title,
        threads=threads,
        taped=taped,
        seed=seed,
        reduce=reduce,
        wanted=tuple(wanted),
        is_buffer=tuple([found.is_buffer for found in packed.closed_over]),
        eager=EagerOptions(
            eager, eager_seed if predicted is None else predicted, predicted is not None
        ),
    )
    leaf = Leaf([packed.data, *packed.tensors], needs_grad=any(wanted))
    parts = []
    for some, (_, worker) in zip(items, placed, strict=True):
        shared = leaf if len(some) == 1 else Shared([leaf], title, worker)
        parts.append(_WorkerChunks(spec, [chunk.chunk(spec, shared, worker) for chunk in some]))
    executor = executor_of(owner)
    outputs = _run(fn, parts, owner, executor)
    results = Results.joined(r.results for part in parts for r in part.results)
    if not outputs:
        executor.forget(chunk for part in parts for chunk in part.chunks)
        return results.build(())
    recording = RemoteRecording(title, results.entries, parts, sum(wanted), predictor, executor)
    return join(recording, results, outputs, takers)


def _placed(
    count: int, workers: Sequence[WorkerInfo], threads: bool, chunksize: int | None
) -> list[tuple[list[range], str]]:
    """The items of each chunk, by worker, in order."""
    weights = [w.threads if threads else 1 for w in workers]
    if chunksize is None:
        placed = [[r] if r else [] for r in share(count, weights)]
    else:
        ranges = cut(count, chunksize)
        placed = [[ranges[i] for i in r] for r in share(len(ranges), weights)]
    return [(some, w.address) for some, w in zip(placed, workers, strict=True) if some]


class _ChunkItems:
    """The rows of a chunk: their tensors, those that take a gradient, and the rest, pickled."""

    def __init__(self, rows: Sequence[Row], r: range) -> None:
        self.rows = r
        self._items = rows[r.start : r.stop]
        leaves, structure = flatten(list(self._items))
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        wanted = list(map(takes_gradient, self.tensors))
        self.takers = [t for t, w in zip(self.tensors, wanted, strict=True) if w]
        self._template = _with_slots(leaves), structure, wanted

    def chunk(self, spec: MapSpec, shared: Node, worker: str) -> Chunk:
        """The call of the chunk; TypeError if an item cannot be pickled."""
        pickled = pickle_or_explain(
            lambda: bytes(cloudpickle.dumps(self._template)),
            lambda: f"item {self._unpicklable()} of the map of {spec.title!r}",
            '. Use over="threads", or give plain values and tensors',
        )
        given = Leaf([pickled, *self.tensors], needs_grad=bool(self.takers))
        return Chunk(spec, self.rows, shared, given, len(self.takers), worker)

    def _unpicklable(self) -> int:
        for index, row in zip(self.rows, self._items, strict=True):
            leaves, structure = flatten(row)
            try:
                cloudpickle.dumps((_with_slots(leaves), structure))
            except Exception:
                return index
        return self.rows.start


def _with_slots(leaves: Sequence[Any]) -> list[Any]:
    """The same leaves, with a slot in place of each tensor."""
    count = itertools.count()
    return [Slot(next(count)) if isinstance(x, torch.Tensor) else x for x in leaves]


def _run(
    fn: Callable[..., Any], parts: Sequence[_WorkerChunks], owner: Session, executor: Executor
) -> list[torch.Tensor]:
    """Run all chunks; returns the outputs of their results."""
    chunks = [chunk for part in parts for chunk in part.chunks]
    sums = [part.sum for part in parts if part.sum is not None]
    nodes = executor.run([*chunks, *sums], wait=False)
    try:
        error = _wait(chunks, sums, executor)
        if error is None:
            values = iter(executor.values([node for part in parts for node in part.reads]))
            executor.forget([n for n in nodes if not isinstance(n, Chunk)])
            return [t for part in parts for t in part.take([next(values) for _ in part.reads])]
    except BaseException:
        executor.forget(nodes)
        raise
    executor.forget(nodes)
    cause = error.__cause__ if isinstance(error, LayerError) else None
    if isinstance(cause, ItemError):
        where = next(c.worker for c in chunks if cause.index in c.rows)
        raise item_error(cause.error, cause.index, fn, owner.named(str(where)), cause.frames)
    raise cause if isinstance(cause, Exception) else error


def _wait(
    chunks: Sequence[Chunk], sums: Sequence[Node], executor: Executor
) -> BaseException | None:
    """Wait for all of it, or the error of the first chunk, in order, that has one.

    Chunks after one that failed are cancelled; those before it may yet fail, and then come first.
    """
    pending, found = list(chunks), None
    while pending:
        error = executor.wait(pending)
        if error is None:
            break
        failed = next(
            (i for i, chunk in enumerate(pending) if executor.failure(chunk) is not None), None
        )
        if failed is None:
            return error
        found = executor.failure(pending[failed])
        executor.forget([*sums, *pending[failed:]])
        pending = pending[:failed]
    return found or executor.wait(sums)


class RemoteRecording(MapRecording):
    """Chunks on workers. Inputs are the closed-over tensors, then those of each chunk's items."""

    def __init__(
        self,
        title: str,
        entries: Sequence[int],
        parts: Sequence[_WorkerChunks],
        shared: int,
        predictor: BackwardPredictor | None,
        executor: Executor,
    ) -> None:
        super().__init__(title, entries)
        self.parts = parts
        self.shared = shared
        self.predictor = predictor
        self.executor = executor

    def backward(self, cotangents: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Gradients from all workers at once, summed from the last worker to the first."""
        self.claim(cotangents, retain)
        if self.predictor is not None:
            self.predictor.observe(self.entries, cotangents)
        rest = iter(cotangents)
        nodes: dict[int, ChunksPullback] = {}
        found: dict[int, _Gradients] = {}
        for at, part in enumerate(self.parts):
            given = [next(rest) for r in part.results for _ in r.results.entries]
            eager = part.from_eager(given)
            if eager is not None:
                found[at] = eager
            elif any(c is not None for c in given):
                nodes[at] = ChunksPullback(
                    part.chunks, part.results, given, retain, part.spec.threads
                )
        found.update(zip(nodes, self._run(list(nodes.values())), strict=True))
        if self.is_used_up:
            self._forget_tapes()
        shared = [found[at][0] for at in sorted(found)]
        items: list[Gradient] = []
        for at, part in enumerate(self.parts):
            by_chunk = found[at][1] if at in found else [None] * len(part.chunks)
            for chunk, grads in zip(part.chunks, by_chunk, strict=True):
                items += [None] * chunk.taken if grads is None else grads
        return [*(total(shared) if shared else [None] * self.shared), *items]

    def _run(self, nodes: list[ChunksPullback]) -> list[Any]:
        if not nodes:
            return []
        submitted = self.executor.run(nodes, wait=False)
        try:
            error = self.executor.wait(nodes)
            # Raised here, where no frame holds a future: the traceback would keep it alive.
            if error is not None:
                raise error
            return self.executor.values(nodes)
        except BaseException:
            # What is left of the tapes cannot be used again.
            self._forget_tapes()
            self.used.update(self.entries)
            raise
        finally:
            self.executor.forget(submitted)

    def _forget_tapes(self) -> None:
        self.executor.forget(chunk for part in self.parts for chunk in part.chunks)

    def differentiable(
        self, inputs: Sequence[torch.Tensor], cotangents: Sequence[Gradient]
    ) -> list[Gradient]:
        """The gradients, wrapped so that differentiating them again raises."""
        with torch.no_grad():
            found = self.backward(cotangents, True)
        behind = [t for t in (*inputs, *cotangents) if t is not None and t.requires_grad]
        return list(_OnceDifferentiable.apply(self.title, len(found), *found, *behind))


_Gradients = tuple[list[Gradient], Sequence[list[Gradient] | None]]


class _WorkerChunks:
    """The chunks on one worker, their results, and the gradients that came along with those.

    `sum` is the node that sums the eager gradients of several chunks; None where there is no need.
    """

    def __init__(self, spec: MapSpec, chunks: Sequence[Chunk]) -> None:
        self.spec = spec
        self.chunks = list(chunks)
        eager = spec.taped and spec.eager.asked is not False
        self.sum = sum_on_worker(chunks) if eager and len(chunks) > 1 else None
        self.results: list[ChunkResult] = []
        assert chunks[0].settings is not None
        self._settings = chunks[0].settings.outside_autocast().without_grad()
        self._shared: list[Gradient] | None = None

    @property
    def reads(self) -> list[Call]:
        """The nodes whose values have the results."""
        return [*self.chunks] if self.sum is None else [self.sum]

    def take(self, values: list[Any]) -> list[torch.Tensor]:
        """Keep what came back in these values of `reads`, but for the outputs, which it returns."""
        if self.sum is not None:
            [(values, self._shared)] = values
        self.results = [result for _, result in values]
        if self.sum is None and self.results[0].eager is not None:
            self._shared = self.results[0].eager.shared
        return [output for outputs, _ in values for output in outputs]

    def from_eager(self, cotangents: Sequence[Gradient]) -> _Gradients | None:
        """The eager gradients, scaled, if the cotangents of all losses are one multiple of theirs.

        Only under the settings of torch that they were made with. Without ``eager_grad=True`` only
        if a backward would give the same bits, as it does for a factor that is a power of two.
        """
        if self._shared is None or settings_now().without_grad() != self._settings:
            return None
        rest, values, items = iter(cotangents), [], []
        for result in self.results:
            assert result.eager is not None
            items.append(result.eager.items)
            for at, cotangent in enumerate(itertools.islice(rest, len(result.results.entries))):
                if (cotangent is None) is (at in result.eager.leads):
                    return None  # not of all losses, or of another output
                values += [] if cotangent is None else [cotangent]
        if len({v.item() for v in values}) != 1:
            return None
        # The seed as it was there, rounded to the losses' own precision.
        seed = torch.full_like(values[0], self.spec.eager.seed).item()
        factor = values[0].item() / seed
        exact = not isinstance(factor, complex) and abs(math.frexp(factor)[0]) == 0.5
        if not exact and not self.spec.eager.asked:
            return None
        if factor == 1:
            return self._shared, items
        return _scaled(self._shared, factor), [_scaled(grads, factor) for grads in items]


def _scaled(grads: Sequence[Gradient], factor: Any) -> list[Gradient]:
    return [None if grad is None else grad * factor for grad in grads]


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients of a map over processes: to differentiate them again is an error that says so."""

    @staticmethod
    def forward(ctx: Any, title: str, count: int, *tensors: Gradient) -> Any:
        ctx.title = title
        ctx.set_materialize_grads(False)
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Gradient) -> Any:
        raise TaskgradError(
            f"the gradient of a map of {ctx.title!r} over processes cannot be differentiated again "
            '(create_graph=True): its graph is on the workers. Use over="threads", which can'
        )
