"""Sharded tensors as arguments of a parallel map: each rank reads its part on its own worker."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from taskgrad.graph.parts import PartView
from taskgrad.spmd.sharded.layout import Part, Parts, Span
from taskgrad.spmd.sharded.resharding import resharded
from taskgrad.spmd.sharded.running import view
from taskgrad.worker_names import WorkerName


def rank_parts(
    x: Parts, axes: Sequence[int | None], sizes: Sequence[int], workers: Sequence[WorkerName]
) -> list[PartView]:
    """What each rank gets of a tensor, as an input of its call.

    `axes` has the mapped axis of each level of the map, of what the level before left; `sizes` are
    the lengths of the levels, and `workers` those of the ranks, in row-major order. What a worker
    lacks is sent to it by the others, and the result is not kept.
    """
    left = list(range(len(x.shape)))
    dims = [None if axis is None else left.pop(axis) for axis in axes]
    mapped = [dim for dim in dims if dim is not None]
    places = [
        {dim: at for dim, at in zip(dims, place, strict=True) if dim is not None}
        for place in product(*map(range, sizes))
    ]
    source = _there(x, mapped, places, workers)
    found = []
    for place, worker in zip(places, workers, strict=True):
        part = _holder(source, worker, place)
        assert part is not None
        cut = [
            place[dim] - (part.start if dim == source.axis else 0) if dim in place else slice(None)
            for dim in range(len(x.shape))
        ]
        found.append(view(part, tuple(cut) if place else ()))
    return found


def _there(
    x: Parts,
    mapped: Sequence[int],
    places: Sequence[dict[int, int]],
    workers: Sequence[WorkerName],
) -> Parts:
    """The tensor, such that each worker has what its ranks need."""
    ranks = list(zip(places, workers, strict=True))
    if all(_holder(x, worker, place) is not None for place, worker in ranks):
        return x
    if not mapped:
        return resharded(x, None, [Span(worker) for worker in dict.fromkeys(workers)])
    axis = x.axis if x.axis is not None and x.axis in mapped else mapped[0]
    needed: dict[WorkerName, list[int]] = {}
    for place, worker in ranks:
        needed.setdefault(worker, []).append(place[axis])
    return resharded(x, axis, [Span(w, min(at), max(at) + 1) for w, at in needed.items()])


def _holder(x: Parts, worker: WorkerName, place: dict[int, int]) -> Part | None:
    """The part on this worker that has all of what a rank needs; None if none has."""
    for part in x.parts:
        if part.worker.address != worker.address:
            continue
        if x.axis is None:
            return part
        if x.axis in place and part.start <= place[x.axis] < part.stop:
            return part
    return None
