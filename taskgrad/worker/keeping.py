"""A copy of a shard from before a load, kept until all shards have loaded their part.

For loads of a state and of a checkpoint: hooks of modules, ``set_extra_state`` or an optimizer may
raise on one worker when others have loaded their part already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.errors import LayerError
from taskgrad.worker.store import ResidentShard, Store
from taskgrad.worker.undo import Undo, copied


@dataclass
class Kept:
    """The contents of a shard's layers, and what trains them."""

    layers: Undo
    optimizer: torch.optim.Optimizer | None
    training: Any
    loss: Any

    def restore(self, shard: ResidentShard) -> None:
        """Put all of it back."""
        self.layers.restore()
        shard.optimizer, shard.training, shard.loss = self.optimizer, self.training, self.loss


def keep(store: Store, token: str) -> None:
    """Copy the shard as it is now."""
    shard = store.shard(token)
    with shard.lock:
        copy = copied if shard.training is None else shard.training.copies
        layers = Undo(list(shard.layers.values()), copy, gradients="which")
        shard.kept = Kept(layers, shard.optimizer, shard.training, shard.loss)


def take_back(store: Store, token: str) -> None:
    """Undo the load on this shard."""
    shard = store.shard(token)
    with shard.lock:
        if shard.kept is not None:
            shard.kept.restore(shard)
            shard.kept = None


def settle(store: Store, token: str) -> None:
    """All shards have loaded their part: drop the copy."""
    shard = store.shard(token)
    with shard.lock:
        shard.kept = None


def load(
    store: Store, token: str, states: dict[int, dict[str, Any]], *, names: dict[int, str]
) -> None:
    """Load a state_dict into each layer; `names` are those of the layers.

    Raises
    ------
    LayerError
        A layer raised.
    """
    shard = store.shard(token)
    with shard.lock:
        for i, values in states.items():
            layer: nn.Module = shard.layers[i]
            try:
                layer.load_state_dict(values, strict=False)
            except Exception as error:
                raise LayerError(
                    f"loading a state into layer {names[i]!r} on worker {store.address} raised "
                    f"{type(error).__name__}: {error}\nNothing was loaded on any worker.",
                    names[i],
                    store.address,
                    error,
                ) from error
