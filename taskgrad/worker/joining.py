"""Join shards of several chains on one worker, so that they are trained together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from taskgrad.errors import TaskgradError
from taskgrad.worker.settings import JointLock, YieldingLock
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store


class Part(NamedTuple):
    """A shard that is joined to others: its token, and what its layers and parameters are there.

    `first` is added to the index of a layer, and `prefix` put before the name of a parameter.
    """

    token: str
    first: int
    prefix: str


def join(store: Store, token: str, *, parts: list[Part], copied: list[str]) -> None:
    """Make a shard of the layers and parameters of others, which have the same objects still.

    `copied` are the parameters of which other joined shards have copies. Without parts the shard is
    a place for calls of functions.

    Raises WorkerLostError if a part is not here; TaskgradError if parts are on several devices.
    """
    if store.get(token) is not None:  # Dask runs this again
        return
    # Threads take the locks of parts in this order, whatever they are joined to.
    shards = {part: store.shard(part.token) for part in sorted(parts)}
    devices = {shard.device for shard in shards.values()}
    if len(devices) > 1:
        raise TaskgradError(
            f"chains that are trained together have layers on worker {store.worker} on the "
            f"devices {', '.join(sorted(map(str, devices)))}: give them one device there"
        )
    layers: dict[int, Any] = {}
    parameters: dict[str, nn.Parameter] = {}
    trainable: set[str] = set()
    for part in parts:  # in the order of their chains
        shard = shards[part]
        layers |= {part.first + i: layer for i, layer in shard.layers.items()}
        parameters |= {part.prefix + name: p for name, p in shard.parameters.items()}
        trainable |= {part.prefix + name for name in shard.trainable}
    locks = [shard.lock for shard in shards.values() if isinstance(shard.lock, YieldingLock)]
    joined = ResidentShard(
        layers,
        parameters,
        next(iter(devices), torch.device("cpu")),
        frozenset(copied),
        frozenset(trainable),
        lock=JointLock(locks) if locks else YieldingLock(store.give_thread_back),
        parts=tuple(shards.values()),
    )
    store.put(token, joined)
