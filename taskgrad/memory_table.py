"""The table of what workers hold of a chain, or of several that are trained together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from taskgrad.display.table import MemoryRow, Table
from taskgrad.graph.shards import Shard
from taskgrad.layout import Layout
from taskgrad.worker import shard_ops
from taskgrad.worker.memory import MemoryUsage


def memory_table(layout: Layout, shards: Iterable[Shard]) -> Table[MemoryRow]:
    """What these shards hold now, by worker; the devices are those of the layout's own layers."""
    shards = list(shards)
    held = layout.results([layout.task(shard, shard_ops.memory, {}) for shard in shards])
    total: dict[str, Counter[str]] = {}
    for shard, sizes in zip(shards, held, strict=True):
        total.setdefault(shard.worker, Counter()).update(sizes)
    names, devices = layout.session.names, layout.device_memory()
    kinds = vars(MemoryUsage())

    def row(worker: str, found: Counter[str]) -> MemoryRow:
        sizes: dict[str, Any] = {kind: found[kind] for kind in kinds}
        about = devices.get(worker, {})
        return MemoryRow(worker, **sizes, **about, worker_name=names.get(worker))

    return Table(MemoryRow, [row(*item) for item in total.items()])
