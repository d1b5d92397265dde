"""Run the items of a map in threads, and their backward.

A segment is items that run one after the other in one thread. Each segment has an autograd graph of
its own, so that its backward can run in a thread of its own as well. In the caller's graph the map
is one autograd function: its inputs are the tensors that take a gradient, its outputs those of the
results that require one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from taskgrad.autograd import Recording, record
from taskgrad.errors import TapeError
from taskgrad.graph.cotangents import Gradient, add_each
from taskgrad.graph.pytree import Structure, builds, carries_gradient, flatten
from taskgrad.item_errors import is_ctrl_c
from taskgrad.mapping.reducing import fold
from taskgrad.mapping.threads import run_all
from taskgrad.remote_errors import own_frames
from taskgrad.worker.randomness import random_stream

Row = tuple[Any, ...]
"""The arguments of one call of the mapped function."""


def cut(count: int, size: int) -> list[range]:
    """Chunks of this many items, the last one maybe smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def share(count: int, weights: Sequence[int]) -> list[range]:
    """Divide `count` items in proportion to these weights, as evenly as whole items allow.

    One range for each weight, in order; with few items those at the end are empty.
    """
    total = sum(weights)
    edges, so_far = [0], 0
    for weight in weights:
        so_far += weight
        edges.append(-(-count * so_far // total))
    return [range(a, b) for a, b in itertools.pairwise(edges)]


_NO_STREAM = contextlib.nullcontext()


class ItemError(Exception):
    """An item raised: its place in the input, its exception, and the frames of its traceback."""

    def __init__(self, index: int, error: BaseException, frames: str) -> None:
        super().__init__(index, error, frames)
        self.index = index
        self.error = error
        self.frames = frames


class ItemFunction(NamedTuple):
    """The mapped function, and how it is called with every item.

    With `taped` gradients are to flow through it, also to those of the closed-over tensors that
    were copied for it, `shared`. Without `seed` items draw from torch's global generator. With
    `reduce` the results of a segment are added up to one.
    """

    fn: Callable[..., Any]
    taped: bool
    seed: int | None
    reduce: bool
    shared: Sequence[torch.Tensor] = ()


@dataclass
class Results:
    """Results of items, in order: the leaves of all of them, and the structure of each.

    `flags` marks the leaves that are outputs, through which gradients can flow; their place among
    the leaves is None. `entries` has for each output the position of its result.
    """

    leaves: list[Any]
    structures: list[Structure]
    flags: list[bool]
    entries: list[int]

    @classmethod
    def joined(cls, parts: Iterable[Results]) -> Results:
        """The results of several parts of a map, one after the other."""
        found = cls([], [], [], [])
        for part in parts:
            found.entries += [len(found.structures) + e for e in part.entries]
            found.leaves += part.leaves
            found.structures += part.structures
            found.flags += part.flags
        return found

    def build(self, outputs: Iterable[Any]) -> list[Any]:
        """The results, with these outputs."""
        rest, pairs = iter(outputs), zip(self.leaves, self.flags, strict=True)
        return builds([next(rest) if flag else leaf for leaf, flag in pairs], self.structures)


@dataclass
class Segment:
    """Items that ran one after the other, and the autograd graph of that.

    `taken` are the items' tensors that take a gradient, `outputs` the tensors of the results that
    require one, `shared` the closed-over tensors that take one, the same for all of a map.
    """

    results: Results
    taken: list[torch.Tensor]
    outputs: list[torch.Tensor]
    shared: Sequence[torch.Tensor] = ()


def takes_gradient(leaf: Any) -> bool:
    """True for a tensor that autograd computes a gradient of."""
    return carries_gradient(leaf) and bool(leaf.requires_grad)


class SegmentInput(NamedTuple):
    """Rows from item `start` on, as leaves, of which those at `wanted` are to take a gradient.

    If `copied` the function gets copies: the memory is also used by others.
    """

    start: int
    leaves: list[Any]
    structure: Structure
    wanted: list[bool]
    copied: bool = False

    def fed(self, taped: bool) -> tuple[list[Row], list[torch.Tensor]]:
        """The rows as the function gets them, and the leaves of autograd that were put in."""
        taken: list[torch.Tensor] = []
        given: list[Any] = []
        for at, (leaf, wanted) in enumerate(zip(self.leaves, self.wanted, strict=True)):
            if taped and wanted and at in self.structure.parameters:
                leaf = nn.Parameter(leaf.detach().clone())  # the function may train it
                taken.append(leaf)
            elif taped and wanted:
                start = leaf.detach().requires_grad_()
                taken.append(start)
                # Only what is no leaf of autograd can be written in place by the function.
                leaf = start if leaf.is_leaf and not self.copied else start.clone()
            elif self.copied and isinstance(leaf, torch.Tensor):
                leaf = leaf.clone()
            given.append(leaf)
        return self.structure.build(given), taken


def run_segments(
    function: ItemFunction,
    parts: Sequence[SegmentInput],
    threads: int,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Segment]:
    """Run these items, each part as a segment, in this many threads.

    `is_wanted` is called before each item; once it is False, no more items are run. Raises
    ItemError if an item raised; of several that did, for the first in the order of the items.
    """

    def run(rows: SegmentInput, is_cancelled: Callable[[], bool]) -> Segment:
        return _run_segment(function, rows, lambda: is_wanted() and not is_cancelled())

    return run_all(run, parts, threads)


def _run_segment(
    function: ItemFunction, rows: SegmentInput, is_wanted: Callable[[], bool]
) -> Segment:
    given, taken = rows.fed(function.taped)
    results, seed = [], function.seed
    for index, row in enumerate(given, rows.start):
        if not is_wanted():
            break  # the results will not be used
        try:
            with _NO_STREAM if seed is None else random_stream(seed, 0, index, "map"):
                results.append(function.fn(*row))
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            raise ItemError(index, error, own_frames(error)) from error
    if function.reduce and results:
        results = [fold(results)]
    found = Results([], [], [], [])
    outputs: list[torch.Tensor] = []
    inside = {id(t) for t in (*taken, *function.shared)}

    def requires(leaf: Any) -> bool:
        return function.taped and takes_gradient(leaf)

    def flows(leaf: Any) -> bool:
        if not requires(leaf):
            return False
        trained = isinstance(leaf, nn.Parameter) and leaf._version > 0
        return not leaf.is_leaf or (id(leaf) in inside and not trained)

    for entry, result in enumerate(results):
        leaves, structure = flatten(result, flows)
        for at, leaf in enumerate(leaves):
            own = at in structure.parameters and not flows(leaf)
            flag = not own and requires(leaf)
            if flag:
                outputs.append(leaf)
                found.entries.append(entry)
                leaf = None
            found.flags.append(flag)
            keeps = own or not isinstance(leaf, torch.Tensor)
            found.leaves.append(leaf if keeps else leaf.detach())
        found.structures.append(structure)
    return Segment(found, taken, outputs)


def differentiate(
    segments: Sequence[Segment],
    seeds: Sequence[Sequence[Gradient]],
    threads: int,
    *,
    retain: bool,
    create: bool = False,
) -> tuple[list[list[Gradient]], list[list[Gradient]]]:
    """Take cotangents, or None, of each segment's outputs back through it, in this many threads.

    Returns for each segment the gradients of the closed-over tensors, and of its items' tensors.
    `retain` and `create` are as in ``torch.autograd.grad``.
    """
    pairs = list(zip(segments, seeds, strict=True))[::-1]
    found = run_all(lambda pair, _: _grad(*pair, retain, create), pairs, threads)[::-1]
    count = len(segments[0].shared)
    return [grads[:count] for grads in found], [grads[count:] for grads in found]


def total(parts: Sequence[Sequence[Gradient]]) -> list[Gradient]:
    """Sum gradients of the same tensors from several segments; None counts as zero.

    From the last segment to the first, as one graph of all items would add them.
    """
    found = list(parts[-1])
    for part in parts[-2::-1]:
        found = add_each(found, part)
    return found


def _grad(
    segment: Segment, seeds: Sequence[Gradient], retain: bool, create: bool
) -> list[Gradient]:
    takers = [*segment.shared, *segment.taken]
    pairs = [
        (output, seed.to(output.device))
        for output, seed in zip(segment.outputs, seeds, strict=True)
        if seed is not None
    ]
    if not pairs or not takers:
        return [None] * len(takers)
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            takers,
            [seed for _, seed in pairs],
            retain_graph=retain,
            create_graph=create,
            allow_unused=True,
        )
    )


def on_host(leaf: Any) -> Any:
    """A leaf as it can be sent: in the memory of the host."""
    if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta"):
        return leaf.cpu()
    return leaf


class MapRecording(Recording):
    """The backward of one map of a function, `title`.

    `entries` has for each output the position of its result. Each result can be differentiated
    once, as if it had a graph of its own.
    """

    def __init__(self, title: str, entries: Sequence[int]) -> None:
        self.title = title
        self.entries = list(entries)
        self.used: set[int] = set()

    def claim(self, cotangents: Sequence[Gradient], retain: bool) -> None:
        """Mark the results with a cotangent as used, unless `retain`; TapeError if one is."""
        claimed = {e for e, c in zip(self.entries, cotangents, strict=True) if c is not None}
        again = claimed & self.used
        if again:
            raise TapeError(
                f"backward a second time through result {min(again)} of a map of {self.title!r}: "
                "its tape was used by the first. Pass retain_graph=True to the first if you need "
                "two"
            )
        if not retain:
            self.used |= claimed

    @property
    def is_used_up(self) -> bool:
        """True if no result is left to be differentiated."""
        return self.used.issuperset(self.entries)


def join(
    recording: MapRecording,
    results: Results,
    outputs: list[torch.Tensor],
    inputs: list[torch.Tensor],
) -> list[Any]:
    """The results, with these outputs attached to the caller's autograd graph."""
    outputs = [output.detach() for output in outputs]  # no views: users write in place
    if not outputs or not inputs:
        return results.build(outputs)
    return results.build(record(recording, outputs, inputs))
