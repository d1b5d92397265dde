"""A shard's optimizer. It is made on all shards or on none, and so are its steps.

Every shard makes its part, then all start to use it. `taskgrad.Optimizer` steps with `update`,
`taskgrad.Trainer` with `taskgrad.worker.training.commit`. Both record the step as the shard's
`Update`, which can be taken back until all shards have made it and `settle` says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.worker.failures import making_errors, update_errors
from taskgrad.worker.offload import CopiesInFiles, SpilledState
from taskgrad.worker.optimizers import Groups, make_optimizer, make_scheduler, needs_metric
from taskgrad.worker.shard import ResidentShard, Trained
from taskgrad.worker.store import Store
from taskgrad.worker.training_state import (
    Averages,
    Scaler,
    Training,
    TrainingOptions,
    Update,
)
from taskgrad.worker.undo import Undo, of_torch, untouched_by


def make(
    store: Store,
    token: str,
    *loss_tensors: list[torch.Tensor],
    factory: Callable[..., torch.optim.Optimizer],
    groups: Groups,
    options: TrainingOptions | None = None,
) -> str | None:
    """Make the shard's optimizer over the parameters of these groups; `use` puts it in place.

    `options` are a trainer's, with whose state and scheduler it then comes; its loss function has
    these tensors. Returns the name of the scheduler's class if that needs a metric.

    Raises LayerError if `make_optimizer` or `make_scheduler` did.
    """
    with store.locked(token) as shard:
        made = Trained(None)
        with making_errors(store.worker):
            if options is not None:
                made.training, made.compiled = _training(options, store.folder), options.compiled
            if any(names for names, _ in groups):
                made.optimizer = make_optimizer(factory, shard.parameters, groups, store.worker)
                if made.training is not None and options is not None and options.scheduler:
                    scheduler = make_scheduler(
                        options.scheduler, made.optimizer, options.monitor, store.worker
                    )
                    made.training.scheduler = scheduler
                    made.training.takes_metric = needs_metric(scheduler, options.monitor)
        if options is not None and options.loss:
            [tensors] = loss_tensors
            # What a function closes over, such as weights of classes, is to be where its input is.
            own = [t.to(shard.device, copy=True) for t in tensors]
            made.loss = pack.unpack(options.loss, own, own=True)
            if isinstance(made.loss, nn.Module):
                made.loss.to(shard.device)
        shard.made = made
        metric = made.training is not None and made.training.takes_metric
        return type(made.training.scheduler).__name__ if made.training and metric else None


def _training(options: TrainingOptions, folder: str) -> Training:
    training = Training(options.names, scaler=Scaler() if options.scaled else None)
    training.norms = {} if options.deferred else None
    training.replicated = options.replicated
    training.averages = None if options.decay is None else Averages(options.decay)
    if options.compiled is not None:
        torch.compile(nn.Identity(), **options.compiled)  # raises what is wrong with the options
    if "state" in options.in_files:
        training.spilled = SpilledState(folder)
    if "undo" in options.in_files:
        training.copies = CopiesInFiles(folder, training.spilled)
    return training


def use(store: Store, token: str) -> None:
    """Put in place what was made, once every shard has made its own."""
    with store.locked(token) as shard:
        if shard.made is not None:  # None where Dask runs this again
            made, shard.made = shard.made, None
            shard.use(made)
            shard.update = None
            for layer in shard.modules.values():
                layer._compiled_call_impl = None
                if made.compiled is not None:
                    layer.compile(**made.compiled)


def update(store: Store, token: str, *, number: int, send: list[str]) -> dict[str, torch.Tensor]:
    """Take an optimizer step; returns new values of the parameters that have copies elsewhere.

    If Dask runs the task again, it returns the values without another step.

    Raises LayerError if the optimizer raised; the shard is as it was before; TaskgradError if the
    step was taken back in the meantime.
    """
    with store.locked(token) as shard:
        if shard.update is None or shard.update.number != number:
            shard.update = None  # the step before: all shards have it
            _step(store, shard, number)
        elif shard.update.before is None and not shard.update.settled:
            raise TaskgradError(
                f"optimizer step {number} was taken back on worker {store.worker}, because it "
                "failed on another one: call step() again"
            )
        return shard.values(send)


def _step(store: Store, shard: ResidentShard, number: int) -> None:
    optimizer = shard.optimizer
    if optimizer is None:
        raise TaskgradError(
            f"the shard on worker {store.worker} has no optimizer: make the Optimizer again"
        )
    before = Undo(
        [optimizer],
        without=untouched_by(optimizer),
        gradients="which" if of_torch(optimizer) else "values",
    )
    try:
        with update_errors(store.worker, None, "the optimizer"):
            optimizer.step()
    except BaseException:
        before.restore()
        raise
    shard.update = Update(number, before)


def settled(store: Store, token: str, *, number: int) -> bool:
    """True if this step can no longer be taken back: all shards have made it."""
    with store.locked(token) as shard:
        return shard.update is not None and shard.update.number == number and shard.update.settled


def settle(store: Store, token: str, *, number: int) -> None:
    """Every shard has made this step: give back the copies that could undo it."""
    with store.locked(token) as shard:
        if shard.update is not None and shard.update.number == number:
            shard.update.release()
            shard.update = Update(number, None, settled=True)


def revert(store: Store, token: str, *, number: int) -> None:
    """Undo this step, if it was made here, and refuse to make it from now on."""
    with store.locked(token) as shard:
        if shard.update is not None and shard.update.number == number and shard.update.before:
            shard.update.before.restore()
        shard.update = Update(number, None)
