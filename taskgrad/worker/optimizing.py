"""The optimizer of a shard, as `taskgrad.Optimizer` makes and steps it.

All shards make a step or none: each can take it back until all of them have made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from taskgrad.errors import TaskgradError
from taskgrad.worker.failures import making_errors, update_errors
from taskgrad.worker.optimizers import Groups, make_optimizer
from taskgrad.worker.store import Made, ResidentShard, Store
from taskgrad.worker.undo import Undo, of_torch, untouched_by


@dataclass
class Update:
    """The last step; `undo` takes it back. Once it is `settled`, all shards have made it."""

    number: int
    undo: Undo | None
    settled: bool = False


def make(
    store: Store, token: str, *, factory: Callable[..., torch.optim.Optimizer], names: list[str]
) -> None:
    """Make the shard's optimizer over these parameters; `use` puts it in place."""
    shard = store.shard(token)
    with shard.lock, making_errors(store.address):
        groups: Groups = [(names, {})]
        shard.made = Made(
            make_optimizer(factory, shard.parameters, groups, store.address) if names else None
        )


def use(store: Store, token: str) -> None:
    """Put in place what was made, once every shard has made its own."""
    shard = store.shard(token)
    with shard.lock:
        if shard.made is not None:  # None where Dask runs this again
            made, shard.made = shard.made, None
            shard.optimizer, shard.training, shard.loss = made.optimizer, made.training, made.loss
            shard.update = None
            for layer in shard.layers.values():
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
        The optimizer raised; the shard is as it was before.
    TaskgradError
        The step was taken back in the meantime.
    """
    shard = store.shard(token)
    with shard.lock:
        if shard.update is None or shard.update.number != number:
            shard.update = None  # the step before: all shards have it
            _step(store, shard, number)
        elif shard.update.undo is None and not shard.update.settled:
            raise TaskgradError(
                f"optimizer step {number} was taken back on worker {store.address}, because it "
                "failed on another one: call step() again"
            )
        return {n: shard.parameters[n].detach().to("cpu", copy=True) for n in send}


def _step(store: Store, shard: ResidentShard, number: int) -> None:
    optimizer = shard.optimizer
    if optimizer is None:
        raise TaskgradError(
            f"the shard on worker {store.address} has no optimizer: make the Optimizer again"
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
    shard.update = Update(number, undo)


def settled(store: Store, token: str, *, number: int) -> bool:
    """Whether this step can no longer be taken back: all shards have made it."""
    shard = store.shard(token)
    with shard.lock:
        return shard.update is not None and shard.update.number == number and shard.update.settled


def settle(store: Store, token: str, *, number: int) -> None:
    """Every shard has made this step: drop the copies that could undo it."""
    shard = store.shard(token)
    with shard.lock:
        shard.update = Update(number, None, settled=True)


def take_back(store: Store, token: str, *, number: int) -> None:
    """Undo this step, if it was made here, and refuse to make it from now on."""
    shard = store.shard(token)
    with shard.lock:
        if shard.update is not None and shard.update.number == number and shard.update.undo:
            shard.update.undo.restore()
        shard.update = Update(number, None)
