"""The results of a map as part of the caller's autograd graph.

A map is one autograd function, whose inputs are the tensors that take a gradient, and whose outputs
are those of the results that give one. Its backward runs on workers or in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.autograd import Recording, record
from taskgrad.errors import TapeError
from taskgrad.graph.cotangents import Gradient
from taskgrad.mapping.segments import Results


class MapRecording(Recording):
    """The backward of one map.

    Parameters
    ----------
    title
        The function's name, for messages.
    entries
        For each output the position of the result that it belongs to. Each result can be
        differentiated once, as if it had a graph of its own.
    """

    takes_create_graph = True

    def __init__(self, title: str, entries: Sequence[int]) -> None:
        self.title = title
        self.entries = list(entries)
        self.used: set[int] = set()

    def claim(self, cotangents: Sequence[Gradient], retain: bool) -> None:
        """Mark the results with a cotangent as used, unless the graph is retained.

        Raises
        ------
        TapeError
            One is used already.
        """
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
    """The results, with their outputs attached to autograd's graph."""
    outputs = [output.detach() for output in outputs]  # no views: users write in place
    if not outputs or not inputs:
        return results.build(outputs)
    return results.build(record(recording, outputs, inputs))
