"""Run the items of a map in threads, and their backward; torch and threads, no Dask.

A segment is items that run one after the other in one thread. Each segment has an autograd graph of
its own, so that its backward can run in a thread of its own as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from taskgrad.graph.cotangents import Gradient, add_each
from taskgrad.graph.pytree import Structure, builds, carries_gradient, flatten
from taskgrad.item_errors import is_ctrl_c
from taskgrad.mapping.items import Row
from taskgrad.mapping.reducing import fold
from taskgrad.mapping.threads import CancelToken, run_all
from taskgrad.remote_errors import own_frames
from taskgrad.worker.randomness import random_stream


class ItemError(Exception):
    """An item raised: its place in the input, its exception, and the frames of its traceback."""

    def __init__(self, index: int, error: BaseException, frames: str) -> None:
        super().__init__(index, error, frames)
        self.index = index
        self.error = error
        self.frames = frames


class ItemFunction(NamedTuple):
    """The mapped function, and how it is called with every item.

    With `taped` gradients are to flow back out of it, also into those of the closed-over tensors
    that were copied for it, `shared`. Without a `seed` items draw from torch's generator as it is.
    With `reduce` the results of a segment are added up to one.
    """

    fn: Callable[..., Any]
    taped: bool
    seed: int | None
    reduce: bool
    shared: Sequence[torch.Tensor] = ()


@dataclass
class Results:
    """Results of items, in order: the leaves of all of them, and the structure of each.

    `flags` has for every leaf whether it is an output, into which a gradient can flow; it is None
    here. `entries` has for each output the position of its result.
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
    give one, `shared` the closed-over tensors that take one, the same for every segment of a map.
    """

    results: Results
    taken: list[torch.Tensor]
    outputs: list[torch.Tensor]
    shared: Sequence[torch.Tensor] = ()


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


def _has_history(leaf: Any) -> bool:
    """Whether threads need a leaf of their own in its place; other objects are given themselves."""
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf


def input_of(start: int, rows: Sequence[Row]) -> SegmentInput:
    """These rows, the first of which is item `start`."""
    leaves, structure = flatten(list(rows), _has_history)
    wanted = [carries_gradient(leaf) and leaf.requires_grad for leaf in leaves]
    return SegmentInput(start, leaves, structure, wanted)


def run_segments(
    function: ItemFunction,
    parts: Sequence[SegmentInput],
    threads: int,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Segment]:
    """Run these items, each part as a segment, in this many threads.

    Parameters
    ----------
    is_wanted
        Called before each item; once it is False, no more items are run.

    Raises
    ------
    ItemError
        An item raised; of several that did, the first in the order of the items.
    """

    def run(rows: SegmentInput, token: CancelToken) -> Segment:
        return _run_segment(function, rows, lambda: is_wanted() and not token.is_cancelled())

    return run_all(run, parts, threads)


def _run_segment(
    function: ItemFunction, rows: SegmentInput, is_wanted: Callable[[], bool]
) -> Segment:
    given, taken = rows.fed(function.taped)
    results = []
    for index, row in enumerate(given, rows.start):
        if not is_wanted():
            break  # the results will not be used
        try:
            with _stream(function.seed, index):
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

    def flows(leaf: Any) -> bool:
        if not (function.taped and carries_gradient(leaf) and leaf.requires_grad):
            return False
        return not leaf.is_leaf or (id(leaf) in inside and not _is_trained(leaf))

    for entry, result in enumerate(results):
        leaves, structure = flatten(result, flows)
        for at, leaf in enumerate(leaves):
            own = at in structure.parameters and not flows(leaf)
            flag = not own and function.taped and carries_gradient(leaf) and leaf.requires_grad
            if flag:
                outputs.append(leaf)
                found.entries.append(entry)
                leaf = None
            found.flags.append(flag)
            keeps = own or not isinstance(leaf, torch.Tensor)
            found.leaves.append(leaf if keeps else leaf.detach())
        found.structures.append(structure)
    return Segment(found, taken, outputs)


def _is_trained(leaf: torch.Tensor) -> bool:
    return isinstance(leaf, nn.Parameter) and leaf._version > 0


def _stream(seed: int | None, index: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if seed is None else random_stream(seed, 0, index, "map")


def differentiate(
    segments: Sequence[Segment],
    seeds: Sequence[Sequence[Gradient]],
    threads: int,
    *,
    retain: bool,
    create: bool = False,
) -> tuple[list[list[Gradient]], list[list[Gradient]]]:
    """Take cotangents back through these segments, in this many threads.

    Parameters
    ----------
    seeds
        For each segment a cotangent, or None, for each of its outputs.
    retain, create
        As in ``torch.autograd.grad``.

    Returns
    -------
    tuple
        For each segment the gradients of the closed-over tensors, and of its items' tensors.
    """
    pairs = list(zip(segments, seeds, strict=True))[::-1]
    found = run_all(lambda pair, token: _grad(*pair, retain, create), pairs, threads)[::-1]
    shared = [grads[: len(segment.shared)] for segment, grads in zip(segments, found, strict=True)]
    taken = [grads[len(segment.shared) :] for segment, grads in zip(segments, found, strict=True)]
    return shared, taken


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
