"""The collectives on plain tensors: what each rank sends, and how it combines what it receives.

All but `pmax` and `pmin` are linear, and the transpose of each is another one:

    psum          psum           (an output of every rank is a sum of the inputs of all)
    all_gather    psum_scatter
    ppermute      ppermute with source and destination swapped
    all_to_all    all_to_all with the axes swapped
    pbroadcast    the sum, on the source alone

Sums are taken in rank order, in float32 for the half-precision dtypes: all ranks get the same bits,
in whatever order the messages arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from taskgrad.graph.pytree import carries_gradient, describe
from taskgrad.worker.mailbox import Message
from taskgrad.worker.members import Members

Tensors = Sequence[torch.Tensor]

_HALF = (torch.bfloat16, torch.float16)
# From this many bytes on NumPy asks the system for huge pages, which take less time to map.
_HUGE = 4 << 20
# From this many bytes on, over more than two ranks, each rank sums one part of the tensors.
_IN_PARTS = 1 << 20


@dataclass
class Operation:
    """One collective, of some tensors at once."""

    name: ClassVar[str]
    keeps_numbers: ClassVar[bool] = False  # True if the result of a Python number is one

    def arguments(self) -> str:
        """The arguments that have to be the same on all ranks, for messages."""
        return ""

    def check(self, x: torch.Tensor, size: int) -> None:
        """Raise ValueError if the collective does not take this tensor."""

    def run(self, comm: Members, xs: Tensors, wants: bool) -> tuple[list[torch.Tensor], bool]:
        """The results, and whether any rank needs a gradient for what it sent.

        After the results come tensors that the backward needs, if any.
        """
        payloads: list[list[torch.Tensor]] = [[] for _ in range(comm.size)]
        for x in xs:
            parts = self.parts(x, comm.size, comm.index)
            portable: dict[int, list[torch.Tensor]] = {}  # what several ranks get is one tensor
            for payload, part in zip(payloads, parts, strict=True):
                if id(part) not in portable:
                    portable[id(part)] = [_portable(p) for p in part]
                payload += portable[id(part)]
        messages = comm.exchange(self.title(xs), wants, payloads)
        found = self.join(xs, messages, comm)
        return found, any(m.wants for m in messages)

    def title(self, xs: Tensors) -> str:
        """The call, as messages show it and as the ranks compare it."""
        return f"{self.name}({', '.join(map(describe, xs))}{self.arguments()})"

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        """For each rank what it is sent of a tensor, one tensor or none: by default all of it."""
        return [[x]] * size

    def join(self, xs: Tensors, messages: list[Message], comm: Members) -> list[torch.Tensor]:
        """The results, from what all ranks sent."""
        columns = zip(*(m.payload for m in messages), strict=True)
        return [
            self.one([part.to(x.device) for part in parts])
            for x, parts in zip(xs, columns, strict=True)
        ]

    def one(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Combine the parts of one tensor, given in rank order: by default their sum."""
        return in_order(parts)

    def transpose(self) -> Operation:
        """The operation that computes the inputs' cotangents from those of the results."""
        raise NotImplementedError

    def batched(self) -> Operation:
        """The same of tensors that have one more axis in front."""
        return self


@dataclass
class Sum(Operation):
    """The sum over the ranks, on each."""

    name = "psum"
    keeps_numbers = True

    def run(self, comm: Members, xs: Tensors, wants: bool) -> tuple[list[torch.Tensor], bool]:
        """In two rounds where that sends less: each rank sums one part and sends it to all."""
        if comm.size < 3 or sum(x.nbytes for x in xs) < _IN_PARTS:
            return super().run(comm, xs, wants)
        chunks = [x.reshape(-1).tensor_split(comm.size) for x in xs]
        payloads = [[_portable(c[i]) for c in chunks] for i in range(comm.size)]
        first = comm.exchange(self.title(xs), wants, payloads)
        sums = [in_order(parts) for parts in zip(*(m.payload for m in first), strict=True)]
        second = comm.exchange(f"{self.title(xs)}, second round", wants, [sums] * comm.size)
        found = [
            torch.cat(parts).reshape(x.shape).to(x.device)
            for x, parts in zip(xs, zip(*(m.payload for m in second), strict=True), strict=True)
        ]
        return found, any(m.wants for m in first)

    def transpose(self) -> Operation:
        return Sum()


@dataclass
class Extreme(Operation):
    """The largest or smallest over the ranks, on each."""

    largest: bool
    keeps_numbers = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "pmax" if self.largest else "pmin"

    def join(self, xs: Tensors, messages: list[Message], comm: Members) -> list[torch.Tensor]:
        """The results, then of each that can have a gradient how many ranks have it, this one too.

        That is 0 where this rank has another value.
        """
        results, ties = [], []
        for x, parts in zip(xs, zip(*(m.payload for m in messages), strict=True), strict=True):
            every = torch.stack([part.to(x.device) for part in parts])
            result = every.amax(0) if self.largest else every.amin(0)
            results.append(result)
            if carries_gradient(x):
                ties.append(((x == result) * (every == result).sum(0)).to(x.dtype))
        return results + ties

    def transpose(self) -> Operation:
        return Sum()


@dataclass
class Gather(Operation):
    """The tensors of all ranks, stacked along a new axis or joined along one that they have."""

    axis: int
    tiled: bool
    name = "all_gather"

    def arguments(self) -> str:
        return f", axis={self.axis}, tiled={self.tiled}"

    def check(self, x: torch.Tensor, size: int) -> None:
        _check_axis("axis", self.axis, x.ndim if self.tiled else x.ndim + 1, x)

    def one(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, self.axis) if self.tiled else torch.stack(parts, self.axis)

    def transpose(self) -> Operation:
        return Scatter(self.axis, self.tiled)

    def batched(self) -> Operation:
        return Gather(_after(self.axis), self.tiled)


@dataclass
class Scatter(Operation):
    """The sum over the ranks, of which each rank keeps its part along one axis."""

    axis: int
    tiled: bool
    name = "psum_scatter"

    def arguments(self) -> str:
        return f", scatter_dimension={self.axis}, tiled={self.tiled}"

    def check(self, x: torch.Tensor, size: int) -> None:
        _check_axis("scatter_dimension", self.axis, x.ndim, x)
        _check_split("scatter_dimension", self.axis, x, size, self.tiled)

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        return [[part] for part in _split(x, self.axis, size, self.tiled)]

    def transpose(self) -> Operation:
        return Gather(self.axis, self.tiled)

    def batched(self) -> Operation:
        return Scatter(_after(self.axis), self.tiled)


@dataclass
class Permute(Operation):
    """The tensor of another rank; zeros where none sends."""

    pairs: tuple[tuple[int, int], ...]
    name = "ppermute"

    def arguments(self) -> str:
        return f", perm={list(self.pairs)}"

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        to = dict(self.pairs).get(index)
        return [[x] if i == to else [] for i in range(size)]

    def join(self, xs: Tensors, messages: list[Message], comm: Members) -> list[torch.Tensor]:
        """A copy of what the source sent."""
        source = {to: of for of, to in self.pairs}.get(comm.index)
        if source is None:
            return [torch.zeros_like(x) for x in xs]
        payload = messages[source].payload
        return [torch.empty_like(x).copy_(part) for x, part in zip(xs, payload, strict=True)]

    def transpose(self) -> Operation:
        return Permute(tuple((to, of) for of, to in self.pairs))


@dataclass
class AllToAll(Operation):
    """This rank's part of the tensor of every rank, stacked or joined along an axis."""

    split: int
    concat: int
    tiled: bool
    name = "all_to_all"

    def arguments(self) -> str:
        return f", split_axis={self.split}, concat_axis={self.concat}, tiled={self.tiled}"

    def check(self, x: torch.Tensor, size: int) -> None:
        _check_axis("split_axis", self.split, x.ndim, x)
        _check_axis("concat_axis", self.concat, x.ndim, x)
        _check_split("split_axis", self.split, x, size, self.tiled)

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        return [[part] for part in _split(x, self.split, size, self.tiled)]

    def one(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, self.concat) if self.tiled else torch.stack(parts, self.concat)

    def transpose(self) -> Operation:
        return replace(self, split=self.concat, concat=self.split)

    def batched(self) -> Operation:
        return replace(self, split=_after(self.split), concat=_after(self.concat))


@dataclass
class Broadcast(Operation):
    """The tensor of one rank, on each."""

    source: int
    name = "pbroadcast"

    def arguments(self) -> str:
        return f", source={self.source}"

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        return [[x] if index == self.source else []] * size

    def join(self, xs: Tensors, messages: list[Message], comm: Members) -> list[torch.Tensor]:
        """A copy of what the source sent."""
        payload = messages[self.source].payload
        return [torch.empty_like(x).copy_(part) for x, part in zip(xs, payload, strict=True)]

    def transpose(self) -> Operation:
        return Reduce(self.source)


@dataclass
class Reduce(Operation):
    """The sum over the ranks, on one; zeros on the others."""

    root: int
    name = "the transpose of pbroadcast"

    def arguments(self) -> str:
        return f", source={self.root}"

    def parts(self, x: torch.Tensor, size: int, index: int) -> list[list[torch.Tensor]]:
        return [[x] if i == self.root else [] for i in range(size)]

    def join(self, xs: Tensors, messages: list[Message], comm: Members) -> list[torch.Tensor]:
        if comm.index != self.root:
            return [torch.zeros_like(x) for x in xs]
        return super().join(xs, messages, comm)

    def transpose(self) -> Operation:
        return Broadcast(self.root)


def in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the parts in order, in new memory; half precision is rounded once, at the end."""
    first, *rest = parts
    dtype = first.dtype
    if dtype in _HALF or not rest:
        total = first.to(torch.float32 if dtype in _HALF else dtype, copy=True)
    else:
        total = torch.add(first, rest.pop(0), out=_empty(first))
    for part in rest:
        total += part
    return total.to(dtype)


def _empty(like: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor: if it is large, from NumPy, which asks for huge pages."""
    if like.nbytes < _HUGE or like.device.type != "cpu":
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    memory = torch.from_numpy(np.empty(like.nbytes, np.uint8))
    return memory.view(like.dtype).view(like.shape)


def _portable(x: torch.Tensor) -> torch.Tensor:
    return x.detach().resolve_conj().resolve_neg().cpu()


def _after(axis: int) -> int:
    """Where an axis is once there is one more in front; from the end it stays where it is."""
    return axis + 1 if axis >= 0 else axis


def _split(x: torch.Tensor, axis: int, size: int, tiled: bool) -> Sequence[torch.Tensor]:
    return x.chunk(size, axis) if tiled else x.unbind(axis)


def _check_axis(name: str, axis: Any, ndim: int, x: torch.Tensor) -> None:
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{name}={axis} is no axis of {describe(x)}; there are {ndim} to choose from"
        )


def _check_split(name: str, axis: int, x: torch.Tensor, size: int, tiled: bool) -> None:
    length = x.shape[axis]
    if tiled and length % size:
        raise ValueError(
            f"{name}={axis} of {describe(x)} has length {length}, which the axis size {size} does "
            "not divide"
        )
    if not tiled and length != size:
        raise ValueError(
            f"{name}={axis} of {describe(x)} has length {length}; with tiled=False that has to be "
            f"the axis size, {size}"
        )
