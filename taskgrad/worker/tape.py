"""The tape: all that a forward saves for its backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from taskgrad.graph.cotangents import Gradient, fits, match
from taskgrad.graph.pytree import Structure
from taskgrad.worker.communicator import Communicator
from taskgrad.worker.settings import YieldingLock
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.split_backward import WeightUses
from taskgrad.worker_names import WorkerName


@dataclass
class Tape:
    """All that one forward, of a shard or of a function, saved for its backward."""

    title: str
    inputs: list[list[torch.Tensor | None]]  # per slot, per leaf: the leaf that takes a gradient
    input_structures: list[Structure]
    outputs: list[Any]  # leaves of the output, part of autograd's graph
    output_structure: Structure
    parameters: dict[str, nn.Parameter]
    shard: ResidentShard | None
    communicator: Communicator | None = None  # the rank of a group whose forward it was
    recomputes: bool = False  # looking at what autograd saved would run layers again
    uses: WeightUses | None = None  # of weights, if the backward is split
    nbytes: int | None = None  # once counted
    # By slot, where the steps of a segment take an input from; None if the call has no segment.
    edges: dict[int, GradientEdge] | None = None
    # Held by a backward, and by code that reads what autograd saved: autograd frees it as it goes,
    # without the GIL, and reading it meanwhile would crash the process.
    lock: YieldingLock = field(default_factory=lambda: YieldingLock(reentrant=False))

    def leaves_of(self, position: int) -> slice:
        """Where the leaves of the output's element at a position are among all."""
        children = self.output_structure.children
        start = sum(child.count for child in children[:position])
        return slice(start, start + children[position].count)

    def match(
        self, cotangent: Any, worker: WorkerName, position: int | None = None
    ) -> list[Gradient]:
        """The leaves of a cotangent; CotangentError unless it fits the output, or its element."""
        outputs, structure = self.outputs, self.output_structure
        if position is not None:
            outputs, structure = outputs[self.leaves_of(position)], structure.children[position]
        single = type(cotangent) is torch.Tensor and structure.kind == "leaf"
        if single and fits(cotangent, outputs[0]):
            return [cotangent]
        return match(cotangent, outputs, structure, f"{self.title!r} on {worker}")


@dataclass
class WeightTape:
    """What is left of a tape for the gradients of weights, after the backward for inputs.

    `parameters` are those whose gradients are to be completed; `found` has the parts of them that
    were computed with the cotangents of the inputs.
    """

    shard: ResidentShard
    uses: WeightUses
    parameters: dict[str, nn.Parameter]
    found: dict[str, Gradient]
    nbytes: int | None = None
    lock: YieldingLock = field(default_factory=lambda: YieldingLock(reentrant=False))
