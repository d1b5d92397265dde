"""The ranks of a parallel map in one process, in lockstep: what `tg.pmap` is compared with.

Each rank is a thread; a collective lets all of them come, and computes with plain torch on their
tensors. So one ordinary autograd graph spans all ranks, and its backward is torch's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.graph.pytree import map_leaves


class Lockstep:
    """Stands for ``tg`` in a function that calls collectives."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rank = threading.local()
        self._all = threading.Barrier(size, timeout=200)
        self._given: list[Any] = [None] * size

    def run(self, fn: Callable[..., Any], *xs: torch.Tensor) -> list[Any]:
        """What each rank gives, for tensors that are mapped over their first axis."""
        results: list[Any] = [None] * self._size
        threads = [
            threading.Thread(target=self._run, args=(rank, fn, xs, results))
            for rank in range(self._size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _run(self, rank: int, fn: Callable[..., Any], xs: Any, results: list[Any]) -> None:
        self._rank.index = rank
        results[rank] = fn(*(x[rank] for x in xs))

    def _exchange(self, x: Any) -> list[Any]:
        self._given[self._rank.index] = x
        self._all.wait()
        given = list(self._given)
        self._all.wait()
        return given

    def _reduce(self, tree: Any, op: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return map_leaves(lambda x: op(torch.stack(self._exchange(x))), tree)

    def axis_index(self, axis_name: str) -> int:
        return self._rank.index

    def axis_size(self, axis_name: str) -> int:
        return self._size

    def psum(self, x: Any, axis_name: str) -> Any:
        return self._reduce(x, lambda xs: sum(xs[1:], xs[0]))

    def pmean(self, x: Any, axis_name: str) -> Any:
        return self._reduce(x, lambda xs: sum(xs[1:], xs[0]) / self._size)

    def pmax(self, x: Any, axis_name: str) -> Any:
        return self._reduce(x, lambda xs: xs.amax(0))

    def pmin(self, x: Any, axis_name: str) -> Any:
        return self._reduce(x, lambda xs: xs.amin(0))

    def all_gather(self, x: Any, axis_name: str, *, axis: int = 0, tiled: bool = False) -> Any:
        xs = self._exchange(x)
        return torch.cat(xs, axis) if tiled else torch.stack(xs, axis)

    def psum_scatter(
        self, x: Any, axis_name: str, *, scatter_dimension: int = 0, tiled: bool = False
    ) -> Any:
        total = self.psum(x, axis_name)
        if tiled:
            return total.chunk(self._size, scatter_dimension)[self._rank.index]
        return total.select(scatter_dimension, self._rank.index)

    def ppermute(self, x: Any, axis_name: str, perm: Any) -> Any:
        xs = self._exchange(x)
        source = {to: of for of, to in perm}.get(self._rank.index)
        return torch.zeros_like(x) if source is None else xs[source] * 1

    def all_to_all(
        self, x: Any, axis_name: str, split_axis: int, concat_axis: int, *, tiled: bool = False
    ) -> Any:
        mine = self._rank.index
        if tiled:
            parts = [x.chunk(self._size, split_axis)[mine] for x in self._exchange(x)]
            return torch.cat(parts, concat_axis)
        return torch.stack([x.select(split_axis, mine) for x in self._exchange(x)], concat_axis)
