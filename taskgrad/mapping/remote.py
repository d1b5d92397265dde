"""A map over worker processes: chunks as nodes, run there, joined to the driver's graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from distributed import Client

from taskgrad.cluster.session import WorkerInfo, session
from taskgrad.errors import TaskgradError
from taskgrad.executors.base import Executor
from taskgrad.executors.registry import executor_of
from taskgrad.graph.nodes import Leaf, Node
from taskgrad.graph.pytree import Slot, Structure, builds, carries_gradient, flatten
from taskgrad.graph.torch_settings import settings_now
from taskgrad.item_errors import item_error
from taskgrad.mapping.chunks import Chunk, ChunksBackward, Shared, SharedGradient
from taskgrad.mapping.closed_over import Packed, pack_function, title_of
from taskgrad.mapping.cotangents import encode
from taskgrad.mapping.items import Row, cut, share
from taskgrad.mapping.joining import Recording, join
from taskgrad.mapping.segments import Gradient, ItemError, total
from taskgrad.mapping.spec import Reply, Work
from taskgrad.mapping.speculation import Expectation


def map_there(
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
    packed = pack_function(fn)
    wanted = [carries_gradient(t) and t.requires_grad for t in packed.tensors]
    grad = torch.is_grad_enabled()
    items = [_Items(row, i, title_of(fn)) for i, row in enumerate(rows)]
    taped = grad and (any(wanted) or any(any(item.wanted) for item in items))
    expectation = Expectation(fn) if taped and eager is None else None
    expected = None if expectation is None else expectation.cotangent
    work = Work(
        title=title_of(fn),
        threads=threads,
        grad=grad,
        taped=taped,
        seed=seed,
        reduce=reduce,
        wanted=tuple(wanted),
        is_buffer=tuple(packed.is_buffer),
        eager=eager,
        eager_seed=eager_seed if expected is None else expected,
        expected=expected is not None,
    )
    owner = session(client)
    chunks = _chunks(work, packed, items, owner.workers(), chunksize)
    groups = _by_worker(chunks)
    sums = [SharedGradient(group) for group in groups if len(group) > 1 and eager is not False]
    sums = sums if taped else []
    executor = executor_of(owner)
    replies, eager_shared = _run(fn, chunks, sums, executor)
    leaves = [leaf for reply in replies for leaf in reply.leaves]
    structures = [structure for reply in replies for structure in reply.structures]
    flags = [flag for reply in replies for flag in reply.flags]
    if not any(flags):
        executor.forget([*chunks, *sums])
        return builds(leaves, structures)
    by_worker = dict(zip((s.worker for s in sums), eager_shared, strict=True))
    recording = _Recorded(
        work, groups, replies, by_worker, [sum(c.wanted) for c in chunks], sum(wanted), executor
    )
    recording.expectation = expectation
    executor.forget(sums)
    inputs = [t for t, w in zip(packed.tensors, wanted, strict=True) if w]
    inputs += [t for item in items for t, w in zip(item.tensors, item.wanted, strict=True) if w]
    return join(recording, leaves, structures, flags, inputs)


class _Items:
    """One row: its tensors, which of them take a gradient, and the rest as a template."""

    def __init__(self, row: Row, index: int, title: str) -> None:
        leaves, self._structure = flatten(row)
        self._leaves = leaves
        self.index = index
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.wanted = [carries_gradient(t) and t.requires_grad for t in self.tensors]
        self._title = title

    def template(self, first: int) -> tuple[list[Any], Structure]:
        """The row's leaves, with slots for its tensors, counted from `first`; its structure."""
        count = iter(range(first, first + len(self.tensors)))
        leaves = [Slot(next(count)) if isinstance(x, torch.Tensor) else x for x in self._leaves]
        return leaves, self._structure


def _template(items: Sequence[_Items], title: str) -> bytes:
    """The rows of a chunk, pickled, with a slot for each tensor."""
    rows, before = [], 0
    for item in items:
        rows.append(item.template(before))
        before += len(item.tensors)
    try:
        return bytes(cloudpickle.dumps(rows))
    except Exception as error:
        culprit = next((i.index for i in items if not _picklable(i.template(0))), items[0].index)
        raise TypeError(
            f"item {culprit} of the map of {title!r} cannot be sent to a worker, because it cannot "
            f'be pickled ({type(error).__name__}: {error}). Use over="threads", or give plain '
            "values and tensors"
        ) from error


def _picklable(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def _chunks(
    work: Work,
    packed: Packed,
    items: Sequence[_Items],
    workers: Sequence[WorkerInfo],
    chunksize: int | None,
) -> list[Chunk]:
    """The chunks in order, those in a row on one worker."""
    weights = [w.threads if work.threads else 1 for w in workers]
    if chunksize is None:
        placed = [
            (r, w.address) for r, w in zip(share(len(items), weights), workers, strict=True) if r
        ]
    else:
        ranges = cut(len(items), chunksize)
        shares = share(len(ranges), weights)
        placed = [(ranges[i], w.address) for s, w in zip(shares, workers, strict=True) for i in s]
    leaf = Leaf([packed.data, *packed.tensors], needs_grad=False)
    addresses = [address for _, address in placed]
    shared: dict[str, Node] = {
        a: leaf if addresses.count(a) == 1 else Shared(leaf, a) for a in dict.fromkeys(addresses)
    }
    chunks = []
    for rows, address in placed:
        mine = items[rows.start : rows.stop]
        tensors = [t for item in mine for t in item.tensors]
        wanted = tuple(w for item in mine for w in item.wanted)
        given = Leaf([_template(mine, work.title), *tensors], needs_grad=False)
        alone = addresses.count(address) == 1
        chunks.append(Chunk(work, rows, shared[address], given, wanted, address, alone))
    return chunks


def _by_worker(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    groups: dict[str | None, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.worker, []).append(chunk)
    return list(groups.values())


def _run(
    fn: Callable[..., Any],
    chunks: Sequence[Chunk],
    sums: Sequence[SharedGradient],
    executor: Executor,
) -> tuple[list[Reply], list[list[Gradient] | None]]:
    """Run all of it; what the chunks and the sums give."""
    nodes = executor.submit([*chunks, *sums])
    try:
        error = _wait(chunks, sums, executor)
        if error is None:
            values = executor.values([*chunks, *sums])
            executor.forget([n for n in nodes if not isinstance(n, Chunk)])
            return values[: len(chunks)], values[len(chunks) :]
    except BaseException:
        executor.forget(nodes)
        raise
    executor.forget(nodes)
    if isinstance(error, ItemError):
        where = next(c.worker for c in chunks if c.start <= error.index < c.stop)
        raise item_error(error.error, error.index, fn, str(where), error.frames)
    raise error


def _wait(
    chunks: Sequence[Chunk], sums: Sequence[SharedGradient], executor: Executor
) -> BaseException | None:
    """Wait for all of it, or the error of the first chunk, in order, that has one.

    Chunks after one that failed are let go of; those before it may yet fail, and then come first.
    """
    pending, found = list(chunks), None
    while pending:
        error = executor.wait(pending)
        if error is None:
            break
        found = error
        failed = [i for i, chunk in enumerate(pending) if executor.failure(chunk) is not None]
        if not failed:
            return found
        found = executor.failure(pending[failed[0]])
        executor.forget([*sums, *pending[failed[0] :]])
        pending = pending[: failed[0]]
    return found or executor.wait(sums)


class _Recorded(Recording):
    """Chunks on workers. Inputs are what they share, then what each one's items took."""

    def __init__(
        self,
        work: Work,
        groups: Sequence[Sequence[Chunk]],
        replies: Sequence[Reply],
        eager_shared: dict[str | None, list[Gradient] | None],
        taken: Sequence[int],
        shared: int,
        executor: Executor,
    ) -> None:
        entries, before = [], 0
        for reply in replies:
            entries += [before + e for e in reply.entries]
            before += len(reply.structures)
        super().__init__(work.title, entries)
        self.executor = executor
        self.expectation: Expectation | None = None
        self.shared = shared
        self.parts: list[_Part] = []
        rest = iter(zip(replies, taken, strict=True))
        for group in groups:
            pairs = [next(rest) for _ in group]
            self.parts.append(_Part(work, group, pairs, eager_shared.get(group[0].worker)))

    def backward(self, cotangents: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Each worker's where its tapes are, all at once; the last worker's are added first."""
        self.claim(cotangents, retain)
        if self.expectation is not None:
            self.expectation.meet(self.entries, cotangents)
        rest = iter(cotangents)
        nodes: dict[int, ChunksBackward] = {}
        found: list[_Gradients | None] = []
        for at, part in enumerate(self.parts):
            given = [next(rest) for _ in range(sum(part.outputs))]
            found.append(part.from_eager(given))
            if found[-1] is None and any(c is not None for c in given):
                nodes[at] = part.backward(given, retain)
        values = self._run(list(nodes.values()))
        for at, value in zip(nodes, values, strict=True):
            found[at] = value
        if self.is_used_up:
            self.executor.forget([chunk for part in self.parts for chunk in part.chunks])
        shared = [f[0] for f in found if f is not None]
        items: list[Gradient] = []
        for part, f in zip(self.parts, found, strict=True):
            by_chunk = f[1] if f is not None else [None] * len(part.chunks)
            for count, grads in zip(part.taken, by_chunk, strict=True):
                items += [None] * count if grads is None else grads
        return [*(total(shared) if shared else [None] * self.shared), *items]

    def _run(self, nodes: list[ChunksBackward]) -> list[Any]:
        if not nodes:
            return []
        submitted = self.executor.submit(nodes)
        try:
            error = self.executor.wait(nodes)
            if error is None:
                return self.executor.values(nodes)
        except BaseException:
            self._let_go(submitted)
            raise
        finally:
            self.executor.forget(submitted)
        self._let_go(submitted)
        raise error

    def _let_go(self, submitted: Sequence[Node]) -> None:
        """What is left of the tapes after a backward that failed is of no more use."""
        self.executor.forget([*submitted, *(chunk for part in self.parts for chunk in part.chunks)])
        self.used.update(self.entries)

    def differentiable(
        self, inputs: Sequence[torch.Tensor], cotangents: Sequence[Gradient]
    ) -> list[Gradient]:
        """The gradients, in a graph that refuses to be gone through."""
        with torch.no_grad():
            found = self.backward(cotangents, True)
        behind = [t for t in (*inputs, *cotangents) if t is not None and t.requires_grad]
        return list(_Once.apply(self.title, len(found), *found, *behind))


_Gradients = tuple[list[Gradient], list[list[Gradient] | None]]


class _Part:
    """The chunks on one worker, and the gradients that came along with their results."""

    def __init__(
        self,
        work: Work,
        chunks: Sequence[Chunk],
        replies: Sequence[tuple[Reply, int]],
        eager_shared: list[Gradient] | None,
    ) -> None:
        self.work = work
        self.chunks = list(chunks)
        assert chunks[0].settings is not None
        self._settings = chunks[0].settings.outside_autocast().without_grad()
        self.attempts = [reply.attempt for reply, _ in replies]
        self.outputs = [len(reply.entries) for reply, _ in replies]
        self.taken = [count for _, count in replies]
        self._leads: list[int] = []
        self._eager: _Gradients | None = None
        shared = replies[0][0].eager_shared if len(chunks) == 1 else eager_shared
        if shared is not None:
            self._eager = shared, [reply.eager_items for reply, _ in replies]
            before = 0
            for reply, _ in replies:
                self._leads += [before + i for i in reply.leads or ()]
                before += len(reply.entries)

    def from_eager(self, cotangents: Sequence[Gradient]) -> _Gradients | None:
        """The gradients that there are, scaled, if these cotangents are one factor of theirs.

        Only under the settings of torch that they were made with; and where nobody asked for them,
        if that gives the bits that a backward would.
        """
        if self._eager is None or settings_now().without_grad() != self._settings:
            return None
        leads = set(self._leads)
        values = [c for i, c in enumerate(cotangents) if i in leads and c is not None]
        others = any(c is not None for i, c in enumerate(cotangents) if i not in leads)
        if others or len(values) < len(leads) or len({v.item() for v in values}) != 1:
            return None
        # The seed as it was there, rounded to the losses' own precision.
        seed = torch.full_like(values[0], self.work.eager_seed).item()
        factor = values[0].item() / seed
        exact = not isinstance(factor, complex) and abs(math.frexp(factor)[0]) == 0.5
        if not exact and not self.work.eager:
            return None
        if factor == 1:
            return self._eager
        shared, items = self._eager
        return _scaled(shared, factor), [None if g is None else _scaled(g, factor) for g in items]

    def backward(self, cotangents: Sequence[Gradient], retain: bool) -> ChunksBackward:
        """The node of a backward with these cotangents."""
        runs, tensors = encode(cotangents)
        return ChunksBackward(
            self.chunks,
            self.attempts,
            self.outputs,
            runs,
            Leaf(tensors, needs_grad=False),
            retain,
        )


def _scaled(grads: Sequence[Gradient], factor: Any) -> list[Gradient]:
    return [None if grad is None else grad * factor for grad in grads]


class _Once(torch.autograd.Function):
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
