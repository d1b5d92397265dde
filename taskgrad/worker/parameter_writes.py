"""Refuse layers of replicas that write their own parameters in their forward.

Each replica would write its copy by what it is given, and they would no longer be copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from taskgrad.errors import LayerError
from taskgrad.graph.calls import LayerStep
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker_names import WorkerName


@contextmanager
def refused(shard: ResidentShard, steps: Sequence[LayerStep], worker: WorkerName) -> Iterator[None]:
    """Raise LayerError if these steps of a replica write a parameter in the block.

    Once they have, it raises at every later step too: what was written stays so.
    """
    training = shard.training
    if training is None or not training.replicated:
        yield
        return
    before = [(name, p, p._version) for name, p in shard.stage(steps).members().named]
    if training.written is None:
        yield
        training.written = next((name for name, p, seen in before if p._version != seen), None)
    if training.written is not None:
        raise LayerError(
            f"a layer on worker {worker} wrote the parameter {training.written!r} in its forward, "
            "as nn.Embedding does with max_norm: the replicas, which are given other microbatches, "
            "would no longer have the same one. Train with replicas=1, or without what writes it",
            training.written,
            worker.address,
            None,
        )
