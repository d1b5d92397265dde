"""The table of where a chain's layers are, and what each of them takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taskgrad.display.table import PlacementRow, Table
from taskgrad.graph.layers import Model
from taskgrad.plan.costs import LayerCost
from taskgrad.worker_names import WorkerName


def placement_table(
    flat: Model,
    workers: Sequence[str],
    devices: Mapping[str, str],
    names: Mapping[str, Any],
    costs: Sequence[LayerCost] | None,
) -> Table[PlacementRow]:
    """The rows of a model's layers.

    `workers` are the addresses of the layers' workers, `devices` and `names` are by address;
    `costs` are what the placement balances, None if it was given.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for info in flat.tensors.values():
        count, size = sizes.get(info.layer, (0, 0))
        elements = 0 if info.is_buffer else info.nbytes // max(1, info.dtype.itemsize)
        sizes[info.layer] = (count + elements, size + info.nbytes)
    held = [sizes.get(layer.name, (0, 0)) for layer in flat.layers]
    weighed = [size for _, size in held] if costs is None else [cost.total for cost in costs]
    total = max(1, sum(weighed))
    rows = [
        PlacementRow(
            *(layer.name, layer.kind, worker, devices[worker]),
            *held[i],
            activations=None if costs is None else costs[i].activations,
            share=weighed[i] / total,
            worker_name=names.get(worker),
        )
        for i, (layer, worker) in enumerate(zip(flat.layers, workers, strict=True))
    ]
    of = "bytes" if costs is None else "bytes and activations, which the placement balances"
    by_worker: dict[str, float] = {}
    for row in rows:
        by_worker[row.worker] = by_worker.get(row.worker, 0.0) + row.share
    shares = [f"{WorkerName(w, names.get(w)).short} {part:.1%}" for w, part in by_worker.items()]
    return Table(PlacementRow, rows, f"share: of {of}; by worker: {', '.join(shares)}")
