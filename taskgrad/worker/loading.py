"""Load a state or a checkpoint on all shards or on none: begin, load, then undo or finish.

Hooks of modules, ``set_extra_state`` or an optimizer may raise on one worker when others have
loaded their part already. So each shard keeps a copy of itself until all of them are done.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from taskgrad.worker import averaging
from taskgrad.worker.failures import NOTHING_LOADED, layer_errors
from taskgrad.worker.offload import CopiesInFiles
from taskgrad.worker.store import Store
from taskgrad.worker.undo import Undo


def begin(store: Store, token: str) -> None:
    """Copy the shard as it is now, before a load."""
    with store.locked(token) as shard:
        training = shard.trains.training
        in_files = training.copies if training is not None else None
        copies = in_files if isinstance(in_files, CopiesInFiles) else None
        layers = Undo(list(shard.layers.values()), copies, gradients="which")
        shard.before_load = layers, shard.trained


def undo(store: Store, token: str) -> None:
    """Undo the load on this shard."""
    with store.locked(token) as shard:
        if shard.before_load is not None:
            (layers, trained), shard.before_load = shard.before_load, None
            layers.restore()
            shard.use(trained)
            averaging.put_back(shard.trains)


def finish(store: Store, token: str) -> None:
    """All shards have loaded their part: drop the copy."""
    with store.locked(token) as shard:
        shard.before_load = None


def load(
    store: Store, token: str, states: dict[int, dict[str, Any]], *, names: dict[int, str]
) -> None:
    """Load a state_dict into each layer; `names` are those of the layers.

    Raises LayerError if a layer raised.
    """
    with store.locked(token) as shard:
        averaging.average(shard.trains)
        for i, values in states.items():
            layer: nn.Module = shard.layers[i]
            what = f"loading a state into layer {names[i]!r}"
            with layer_errors(what, names[i], store.worker, NOTHING_LOADED):
                layer.load_state_dict(values, strict=False)
