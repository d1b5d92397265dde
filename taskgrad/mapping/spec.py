"""What a worker is told of a chunk of a map, and what comes home of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taskgrad.graph.pytree import Structure
from taskgrad.mapping.segments import Gradient


@dataclass(frozen=True)
class Work:
    """What all chunks of a map have in common.

    Attributes
    ----------
    title
        The function's name.
    threads
        Whether a chunk is run by as many threads as its worker has.
    grad, taped, seed, reduce
        As in `taskgrad.mapping.segments.Task`.
    wanted, is_buffer
        Which of the shared tensors take a gradient, and which are buffers of modules.
    eager
        Whether the backward is run at once: yes, no, or where it pays (None).
    eager_seed
        The cotangent that it is run with.
    expected
        Whether one with that cotangent is likely to come, so that it pays whatever its size.
    """

    title: str
    threads: bool
    grad: bool
    taped: bool
    seed: int | None
    reduce: bool
    wanted: tuple[bool, ...]
    is_buffer: tuple[bool, ...]
    eager: bool | None
    eager_seed: float
    expected: bool


@dataclass
class Reply:
    """What comes home of a chunk.

    Attributes
    ----------
    attempt
        Which one at it: Dask runs a chunk again whose worker was lost.
    leaves, structures, flags
        Of its results: the leaves of all, the structure of each, and which of the leaves give a
        gradient.
    entries
        For each of those leaves the position of its result.
    leads
        The positions among those leaves of the results' losses, if it was differentiated at once.
    eager_shared, eager_items
        The gradients, if so; None of what is shared where it is added up on the worker first.
    """

    attempt: str
    leaves: list[Any]
    structures: list[Structure]
    flags: list[bool]
    entries: list[int]
    leads: list[int] | None = None
    eager_shared: list[Gradient] | None = None
    eager_items: list[Gradient] | None = None
