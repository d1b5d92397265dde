"""The named axes along which the ranks of a parallel map lie."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Mesh:
    """Axes with names and sizes; ranks are numbered along them in row-major order.

    An axis without a name has None for it.
    """

    names: tuple[Hashable, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    def place(self, index: int) -> tuple[int, ...]:
        """A rank's place on each axis."""
        found = []
        for size in reversed(self.sizes):
            index, at = divmod(index, size)
            found.append(at)
        return tuple(reversed(found))

    def along(self, index: int, names: Sequence[Hashable]) -> tuple[int, ...]:
        """The ranks that share this rank's place on all axes but those named.

        They are in row-major order of the axes as they are named here.
        """
        place = dict(enumerate(self.place(index)))
        axes = [self.names.index(name) for name in names]
        found = []
        for at in product(*(range(self.sizes[axis]) for axis in axes)):
            found.append(self._index(place | dict(zip(axes, at, strict=True))))
        return tuple(found)

    def inside(self, inner: Mesh) -> Mesh:
        """The mesh of a map that each rank makes over the axes `inner`."""
        return Mesh(self.names + inner.names, self.sizes + inner.sizes)

    def described(self, index: int) -> str:
        """A rank's place, if there are several axes: `` (i=1, j=0)``; else nothing."""
        if len(self.sizes) == 1:
            return ""
        places = zip(self.names, self.place(index), strict=True)
        return " (" + ", ".join(f"{'_' if n is None else n}={at}" for n, at in places) + ")"

    def _index(self, place: dict[int, int]) -> int:
        found = 0
        for axis, size in enumerate(self.sizes):
            found = found * size + place[axis]
        return found
