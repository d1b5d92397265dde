"""Microbatches of a batch that lies on a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taskgrad.graph.slices import Dims, as_tensors, batch_size, cut
from taskgrad.worker.store import Store


@dataclass(frozen=True)
class TakeSlice:
    """Microbatch `index` of `count`; or what `fraction` of the batch it is."""

    dims: Dims
    index: int
    count: int
    what: str
    fraction: bool

    def run(self, store: Store, batch: Any) -> Any:
        """The slice, in memory of its own; or its fraction of the samples.

        Raises
        ------
        ValueError
            There are fewer samples than microbatches, or the dimensions do not fit.
        """
        batch = as_tensors(batch)
        total = batch_size(batch, self.dims, self.what)
        if total is None or total < self.count:
            raise ValueError(
                f"{self.what} has {total or 'no'} samples, and a step has {self.count} microbatches"
                ". A batch that lies on a worker is cut there: take fewer microbatches"
            )
        part = cut(batch, self.dims, self.index, self.count, self.what)
        if self.fraction:
            return (batch_size(part, self.dims, self.what) or 0) / total
        return part
