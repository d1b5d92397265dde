"""The ranks of one parallel call: calls of one function that run at once and exchange values.

A `ProcessGroup` is what the calls have in common: plain data, which is sent with each call;
on the driver its identity groups the calls, forward and backward.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """One call of a function on several workers at once.

    Attributes
    ----------
    title
        The function's name, for messages.
    axis
        The name of the mapped axis; None if it has none.
    workers
        The address of each rank's worker, in rank order.
    seed
        What the ranks' random streams start from.
    deadline
        Seconds for which a rank waits for another one.
    """

    title: str
    axis: Hashable
    workers: tuple[str, ...]
    seed: int
    deadline: float


@dataclass(frozen=True)
class Rank:
    """One call of a process group, by its place in it."""

    group: ProcessGroup
    index: int

    def __str__(self) -> str:
        return f"rank {self.index} of {self.group.title}"
