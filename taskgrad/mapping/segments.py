"""Run the items of a map in threads, and their backward; torch and threads, no Dask.

A piece is items that run in a row in one thread. What autograd recorded of them stays one graph a
piece, so that the backward of each piece can run in a thread of its own as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.graph.pytree import Structure, carries_gradient, flatten
from taskgrad.item_errors import is_ctrl_c
from taskgrad.mapping.items import Row
from taskgrad.mapping.reducing import fold
from taskgrad.mapping.threads import Halt, run_all
from taskgrad.remote_errors import own_frames
from taskgrad.worker.randomness import random_stream

Gradient = torch.Tensor | None


class ItemError(Exception):
    """An item raised: its place in the input, what it raised, and the frames below ours."""

    def __init__(self, index: int, error: BaseException, frames: str) -> None:
        super().__init__(index, error, frames)
        self.index = index
        self.error = error
        self.frames = frames


@dataclass(frozen=True)
class Task:
    """What is done with every item.

    Attributes
    ----------
    fn
        The function, called with each row.
    grad
        Torch's grad mode while it runs.
    taped
        Whether gradients are to flow back out of it.
    seed
        Of the items' random streams; None: they draw from what there is.
    reduce
        Whether the results of a piece are added up to one.
    shared
        What `fn` closes over and takes a gradient, where that is a copy made for this task.
    """

    fn: Callable[..., Any]
    grad: bool
    taped: bool
    seed: int | None
    reduce: bool
    shared: Sequence[torch.Tensor] = ()


@dataclass
class Piece:
    """Items that ran in a row, and the graph that autograd made of them.

    Attributes
    ----------
    leaves, structures
        Of the results, one for each item, or one of all: the leaves of all of them, detached from
        the graph, and the structure of each.
    flags
        For every leaf, whether a gradient can flow into it.
    taken
        The items' tensors that take a gradient, in order.
    outputs
        The tensors of the results that give one, in order, with their graph.
    entries
        For each of `outputs` the position among the results of the one that it belongs to.
    shared
        What the function closes over that takes a gradient, the same for every piece of a map.
    """

    leaves: list[Any]
    structures: list[Structure]
    flags: list[bool]
    taken: list[torch.Tensor]
    outputs: list[torch.Tensor]
    entries: list[int]
    shared: Sequence[torch.Tensor] = ()


@dataclass
class Rows:
    """Rows to run, as leaves, and which of those are to take a gradient."""

    start: int
    leaves: list[Any]
    structure: Any
    wanted: list[bool] = field(default_factory=list)
    copied: bool = False
    """Whether the function gets copies, as the memory is not its to write in."""

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


def rows_of(start: int, rows: Sequence[Row]) -> Rows:
    """These rows, the first of which is item `start`."""
    leaves, structure = flatten(list(rows), _has_history)
    wanted = [carries_gradient(leaf) and leaf.requires_grad for leaf in leaves]
    return Rows(start, leaves, structure, wanted)


def run_pieces(
    task: Task,
    parts: Sequence[Rows],
    threads: int,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Piece]:
    """Run these items, each part as a piece, so many at once.

    Parameters
    ----------
    is_wanted
        Asked before each item; once it says no, nothing more is run.

    Raises
    ------
    ItemError
        An item raised: the first one, in the order of the items, that did.
    """

    def job(rows: Rows) -> Callable[[Halt], Piece]:
        return lambda halt: _run_piece(task, rows, lambda: halt.is_wanted() and is_wanted())

    return run_all([job(rows) for rows in parts], threads)


def _run_piece(task: Task, rows: Rows, goes_on: Callable[[], bool]) -> Piece:
    given, taken = rows.fed(task.taped)
    results = []
    with torch.set_grad_enabled(task.grad):
        for offset, row in enumerate(given):
            if not goes_on():
                break  # nobody will look at what there is
            index = rows.start + offset
            try:
                with _stream(task.seed, index):
                    results.append(task.fn(*row))
            except BaseException as error:
                if is_ctrl_c(error):
                    raise
                raise ItemError(index, error, own_frames(error)) from error
        if task.reduce and results:
            results = [fold(results)]
    found: list[Any] = []
    structures: list[Structure] = []
    flags: list[bool] = []
    outputs: list[torch.Tensor] = []
    entries: list[int] = []
    inside = {id(t) for t in (*taken, *task.shared)}

    def flows(leaf: Any) -> bool:
        if not (task.taped and carries_gradient(leaf) and leaf.requires_grad):
            return False
        return not leaf.is_leaf or (id(leaf) in inside and not _is_trained(leaf))

    for entry, result in enumerate(results):
        leaves, structure = flatten(result, flows)
        for at, leaf in enumerate(leaves):
            own = at in structure.parameters and not flows(leaf)
            flags.append(not own and task.taped and carries_gradient(leaf) and leaf.requires_grad)
            if flags[-1]:
                outputs.append(leaf)
                entries.append(entry)
            keeps = own or not isinstance(leaf, torch.Tensor)
            found.append(leaf if keeps else leaf.detach())
        structures.append(structure)
    return Piece(found, structures, flags, taken, outputs, entries)


def _is_trained(leaf: torch.Tensor) -> bool:
    return isinstance(leaf, nn.Parameter) and leaf._version > 0


@contextlib.contextmanager
def _stream(seed: int | None, index: int) -> Iterator[None]:
    if seed is None:
        yield
    else:
        with random_stream(seed, 0, index, "map"):
            yield


def differentiate(
    pieces: Sequence[Piece],
    seeds: Sequence[Sequence[Gradient]],
    threads: int,
    *,
    retain: bool,
    create: bool = False,
) -> tuple[list[list[Gradient]], list[list[Gradient]]]:
    """Take cotangents back through these pieces, so many at once.

    Parameters
    ----------
    seeds
        For each piece a cotangent, or None, for each of its outputs.
    retain, create
        As in ``torch.autograd.grad``.

    Returns
    -------
    tuple
        For each piece the gradients of what it shares, and those of its items' tensors.
    """

    def job(piece: Piece, given: Sequence[Gradient]) -> Callable[[Halt], list[Gradient]]:
        return lambda halt: _grad(piece, given, retain, create)

    jobs = [job(piece, given) for piece, given in zip(pieces, seeds, strict=True)]
    found = run_all(jobs[::-1], threads)[::-1]
    shared = [grads[: len(piece.shared)] for piece, grads in zip(pieces, found, strict=True)]
    taken = [grads[len(piece.shared) :] for piece, grads in zip(pieces, found, strict=True)]
    return shared, taken


def total(parts: Sequence[Sequence[Gradient]]) -> list[Gradient]:
    """Gradients of the same tensors from several pieces, added up; None counts as zero.

    The last piece's come first, as one graph of all items would add them.
    """
    found = list(parts[-1])
    for part in parts[-2::-1]:
        found = [
            y if x is None else x if y is None else x + y for x, y in zip(found, part, strict=True)
        ]
    return found


def _grad(piece: Piece, seeds: Sequence[Gradient], retain: bool, create: bool) -> list[Gradient]:
    takers = [*piece.shared, *piece.taken]
    pairs = [
        (output, seed.to(output.device))
        for output, seed in zip(piece.outputs, seeds, strict=True)
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
