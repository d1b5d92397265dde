"""Where the parts of a sharded tensor are: along which axis it is cut, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from taskgrad.arguments import shown, whole
from taskgrad.cluster.session import Session, WorkerSpec
from taskgrad.graph.nodes import Node
from taskgrad.graph.objects import Opaque
from taskgrad.graph.parts import Cut
from taskgrad.graph.pytree import describe
from taskgrad.worker_names import WorkerName


@dataclass(frozen=True)
class Sharded(Opaque):
    """How a tensor lies on workers: cut along `axis`, or with None a copy of it on each.

    As an entry of ``out_axes`` of `pmap` it says that this result stays on the workers, stacked
    along `axis`; with None it has to be the same on all ranks.

    Raises TypeError if the axis is neither an int nor None.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> f = tg.pmap(lambda x: x + 1, out_axes=tg.Sharded(0))
    >>> y = f(torch.tensor([1.0, 3.0]))
    >>> y.shape, y.layout
    (torch.Size([2]), Sharded(axis=0))
    >>> y.gather()
    tensor([2., 4.])
    """

    axis: int | None = 0

    def __post_init__(self) -> None:
        if self.axis is not None:
            object.__setattr__(self, "axis", whole("the axis of Sharded", self.axis))


@dataclass(frozen=True)
class Span(Opaque):
    """A worker, and what it holds along the axis: from `start` to before `stop`."""

    worker: WorkerName
    start: int = 0
    stop: int = 0

    @property
    def length(self) -> int:
        """How much of the axis it is."""
        return self.stop - self.start


@dataclass(frozen=True)
class Part(Span):
    """What one worker holds of a `ShardedTensor`.

    Attributes
    ----------
    worker : WorkerName
        Its address, and the name that it was started with.
    start, stop : int
        The part's place along the axis; both 0 for a copy of the whole.
    """

    node: Node = None  # type: ignore[assignment]  # the fields before have defaults

    def __repr__(self) -> str:
        return f"Part(worker={str(self.worker)!r}, start={self.start}, stop={self.stop})"

    @property
    def span(self) -> Span:
        """The same without what it holds."""
        return Span(self.worker, self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Parts(Opaque):
    """A sharded tensor as data.

    `axis` is that along which it is cut, counted from 0, and `parts` are in its order, without gaps
    between them. With the axis None each part is a copy of the whole.
    """

    session: Session
    shape: torch.Size
    dtype: torch.dtype
    axis: int | None
    parts: tuple[Part, ...]

    @property
    def spans(self) -> list[Span]:
        """Who holds what."""
        return [part.span for part in self.parts]

    def shape_of(self, part: Span) -> tuple[int, ...]:
        """The shape of one part."""
        return shape_of(self.shape, self.axis, part)

    def meta(self) -> torch.Tensor:
        """A tensor of the same shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        return describe(self.meta())


def shape_of(shape: Sequence[int], axis: int | None, span: Span) -> tuple[int, ...]:
    """The shape of what a worker holds of a tensor of this shape."""
    return tuple([span.length if dim == axis else n for dim, n in enumerate(shape)])


def along(axis: int | None, start: int, stop: int) -> Cut:
    """The index of what is between these two along an axis; with None, of all."""
    return () if axis is None else (*[slice(None)] * axis, slice(start, stop))


def axis_of(given: Any, ndim: int, what: str) -> int | None:
    """An axis of a tensor counted from 0, or None.

    Raises TypeError if it is not a whole number; ValueError if there is no such axis.
    """
    if isinstance(given, Sharded):
        given = given.axis
    if given is None:
        return None
    axis = whole("axis", given)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{what} has {ndim} dimensions, and no axis {axis} to cut it along. Give one that it "
            "has, or None for a copy on each worker"
        )
    return axis % ndim


def spans_over(workers: Sequence[WorkerName], shape: Sequence[int], axis: int | None) -> list[Span]:
    """Who shall hold what: parts along the axis, or a copy each.

    Index i of n is where `pmap` over as many workers has rank i of n. A worker for which there is
    nothing is left out; one part is there in any case.
    """
    if axis is None:
        return [Span(worker) for worker in workers]
    size = shape[axis]
    workers = workers[: max(size, 1)]
    ends = [-(-i * size // len(workers)) for i in range(len(workers) + 1)]
    return [Span(w, a, b) for w, (a, b) in zip(workers, pairwise(ends), strict=True)]


def chosen(workers: Any, owner: Session) -> list[WorkerName]:
    """The workers that a user names, by index, name or address; with None all that there are.

    Raises PlacementError if one is not there; ValueError if one is named twice, or none is;
    TypeError if it is not a sequence.
    """
    there = owner.workers()
    if workers is None:
        return [WorkerName(w.address, w.name) for w in there]
    if isinstance(workers, str | bytes) or not isinstance(workers, Sequence):
        raise TypeError(f"workers is a list of indices, names or addresses; got {shown(workers)}")
    given: Sequence[WorkerSpec] = workers
    addresses = [owner.resolve(spec, there) for spec in given]
    if not addresses or len(set(addresses)) < len(addresses):
        raise ValueError(f"workers names each worker once, and at least one; got {shown(workers)}")
    return [owner.named(address) for address in addresses]
