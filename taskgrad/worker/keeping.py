"""A copy of a stage from before a load, kept until all stages have loaded their part.

For loads of a state and of a checkpoint: hooks of modules, ``set_extra_state`` or an optimizer may
raise on one worker when others have loaded their part already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.errors import LayerError
from taskgrad.worker.store import ResidentStage, Store
from taskgrad.worker.undo import Undo, copied


@dataclass
class Kept:
    """The contents of a stage's layers, and what trains them."""

    layers: Undo
    optimizer: torch.optim.Optimizer | None
    training: Any
    loss: Any

    def restore(self, stage: ResidentStage) -> None:
        """Put all of it back."""
        self.layers.restore()
        stage.optimizer, stage.training, stage.loss = self.optimizer, self.training, self.loss


def keep(store: Store, token: str) -> None:
    """Copy the stage as it is now."""
    stage = store.stage(token)
    with stage.lock:
        copy = copied if stage.training is None else stage.training.copies
        layers = Undo(list(stage.layers.values()), copy, gradients="which")
        stage.kept = Kept(layers, stage.optimizer, stage.training, stage.loss)


def take_back(store: Store, token: str) -> None:
    """Undo the load on this stage."""
    stage = store.stage(token)
    with stage.lock:
        if stage.kept is not None:
            stage.kept.restore(stage)
            stage.kept = None


def settle(store: Store, token: str) -> None:
    """All stages have loaded their part: drop the copy."""
    stage = store.stage(token)
    with stage.lock:
        stage.kept = None


def load(
    store: Store, token: str, states: dict[int, dict[str, Any]], *, names: dict[int, str]
) -> None:
    """Load a state_dict into each layer; `names` are those of the layers.

    Raises
    ------
    LayerError
        A layer raised.
    """
    stage = store.stage(token)
    with stage.lock:
        for i, values in states.items():
            layer: nn.Module = stage.layers[i]
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
