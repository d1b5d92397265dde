"""The optimizer of a stage, as `taskgrad.Optimizer` makes and steps it.

All stages make a step or none: each can take it back until all of them have made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from taskgrad.errors import TaskgradError
from taskgrad.worker.failures import making_errors, update_errors
from taskgrad.worker.optimizers import Groups, make_optimizer
from taskgrad.worker.store import Made, ResidentStage, Store
from taskgrad.worker.undo import Undo, of_torch, untouched_by


@dataclass
class Update:
    """The last step; `undo` takes it back. Once it is `settled`, all stages have made it."""

    number: int
    undo: Undo | None
    settled: bool = False


def make(
    store: Store, token: str, *, factory: Callable[..., torch.optim.Optimizer], names: list[str]
) -> None:
    """Make the stage's optimizer over these parameters; `use` puts it in place."""
    stage = store.stage(token)
    with stage.lock, making_errors(store.address):
        groups: Groups = [(names, {})]
        stage.made = Made(
            make_optimizer(factory, stage.parameters, groups, store.address) if names else None
        )


def use(store: Store, token: str) -> None:
    """Put in place what was made, once every stage has made its own."""
    stage = store.stage(token)
    with stage.lock:
        if stage.made is not None:  # None where Dask runs this again
            made, stage.made = stage.made, None
            stage.optimizer, stage.training, stage.loss = made.optimizer, made.training, made.loss
            stage.update = None
            for layer in stage.layers.values():
                if isinstance(layer, nn.Module):
                    layer._compiled_call_impl = None
                    if made.compiled is not None:
                        layer.compile(**made.compiled)


def update(store: Store, token: str, *, number: int, send: list[str]) -> dict[str, torch.Tensor]:
    """One optimizer step; gives the new values of those parameters that have copies elsewhere.

    If Dask runs the task again, it returns the values without another step.

    Raises
    ------
    LayerError
        The optimizer raised; the stage is as it was before.
    TaskgradError
        The step was taken back in the meantime.
    """
    stage = store.stage(token)
    with stage.lock:
        if stage.update is None or stage.update.number != number:
            stage.update = None  # the step before: all stages have it
            _step(store, stage, number)
        elif stage.update.undo is None and not stage.update.settled:
            raise TaskgradError(
                f"optimizer step {number} was taken back on worker {store.address}, because it "
                "failed on another one: call step() again"
            )
        return {n: stage.parameters[n].detach().to("cpu", copy=True) for n in send}


def _step(store: Store, stage: ResidentStage, number: int) -> None:
    optimizer = stage.optimizer
    if optimizer is None:
        raise TaskgradError(
            f"the stage on worker {store.address} has no optimizer: make the Optimizer again"
        )
    undo = Undo(
        [optimizer],
        without=untouched_by(optimizer),
        gradients="which" if of_torch(optimizer) else "values",
    )
    try:
        with update_errors(store.address, None, "the optimizer"):
            optimizer.step()
    except BaseException:
        undo.restore()
        raise
    stage.update = Update(number, undo)


def settled(store: Store, token: str, *, number: int) -> bool:
    """Whether this step can no longer be taken back: all stages have made it."""
    stage = store.stage(token)
    with stage.lock:
        return stage.update is not None and stage.update.number == number and stage.update.settled


def settle(store: Store, token: str, *, number: int) -> None:
    """Every stage has made this step: drop the copies that could undo it."""
    stage = store.stage(token)
    with stage.lock:
        stage.update = Update(number, None, settled=True)


def take_back(store: Store, token: str, *, number: int) -> None:
    """Undo this step, if it was made here, and refuse to make it from now on."""
    stage = store.stage(token)
    with stage.lock:
        if stage.update is not None and stage.update.number == number and stage.update.undo:
            stage.update.undo.restore()
        stage.update = Update(number, None)
