"""The backward of a map's chunks: one task a worker, whatever the number of its chunks.

It is a pullback of several calls at once. A pullback each would be as many tasks, could not spread
the segments of all chunks over the worker's threads, and would add up gradients of closed-over
tensors in another order, to other bits.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.errors import WorkerLostError
from taskgrad.executors.lowering import action_of
from taskgrad.graph.cotangents import Gradient
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.pullback import Pullback
from taskgrad.mapping.chunk import Chunk, ChunkResult
from taskgrad.mapping.segments import Segment, differentiate, on_host, total
from taskgrad.mapping.threads import threads_here
from taskgrad.worker.failures import backward_error
from taskgrad.worker.store import Store
from taskgrad.worker.tape import Tape

Runs = tuple[tuple[int, int], ...]


class ChunksPullback(Pullback):
    """The pullback of chunks on one worker; `given` are the cotangents of their outputs, in order.

    Its value are the gradients of the closed-over tensors, summed, and for each chunk those of its
    items' tensors; None for a chunk without cotangents. A tape is used only if it is of the same
    attempt as the chunk's result. `threads` allows it as many threads as the worker has.
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

        Raises LayerError if autograd raised; WorkerLostError if a tape is not here, or of another
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
                raise backward_error(error, store.address, self.title, None) from error
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
            f"worker {store.address} does not hold what the map of {title!r} left there: "
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

    The losses of a sum all have the same cotangent; so a backward of a thousand items sends no more
    than that of one.
    """
    distinct: dict[Any, int] = {}
    tensors: list[torch.Tensor] = []
    positions = []
    for cotangent in cotangents:
        if cotangent is None:
            positions.append(-1)
            continue
        key = _identity(cotangent)
        if key not in distinct:
            distinct[key] = len(tensors)
            tensors.append(cotangent)
        positions.append(distinct[key])
    return tuple((p, len(list(run))) for p, run in itertools.groupby(positions)), tensors


def decode(runs: Runs, tensors: Sequence[torch.Tensor]) -> list[Gradient]:
    """Inverse of `encode`."""
    return [None if at < 0 else tensors[at] for at, count in runs for _ in range(count)]


def _identity(cotangent: torch.Tensor) -> Any:
    """Equal for cotangents that are the same: numbers by their bits, others by identity."""
    if cotangent.dim() or cotangent.layout is not torch.strided or cotangent.device.type != "cpu":
        return id(cotangent)
    bits = cotangent.detach().resolve_conj().resolve_neg().reshape(1).view(torch.uint8)
    return cotangent.dtype, bytes(bits.tolist())
