"""Exponential moving averages of a shard's parameters, kept where the parameters live.

An average cannot be taken back unless it is copied, and a step may be, until all shards have made
it. So a step's parameters are averaged late: once the step stays, and before the next update writes
them. That takes no memory but the averages' own.
"""

from __future__ import annotations

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from taskgrad.errors import TaskgradError
from taskgrad.worker.offload import CHUNK, in_rows
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store
from taskgrad.worker.training_state import Training


def after_update(shard: ResidentShard, training: Training) -> None:
    """The optimizer has taken a step: its parameters are to be averaged."""
    if training.averages is not None:
        training.averages.due = {n: shard.parameters[n]._version for n in training.names}


def put_back(shard: ResidentShard) -> None:
    """Parameters were written as the last step had left them: that is no reason to refuse them."""
    training = shard.training
    if training is not None and training.averages is not None and training.averages.due is not None:
        after_update(shard, training)


def average(shard: ResidentShard) -> None:
    """Average the parameters of the last step, once. It can no longer be taken back afterwards.

    To be called when all shards have made that step. If it raises, a further call goes on.

    Raises TaskgradError if something else than the optimizer wrote a parameter since.
    """
    training = shard.training
    averages = None if training is None else training.averages
    if training is None or averages is None or averages.due is None:
        return
    if shard.update is not None:
        shard.update.release()
    due, update = averages.due, get_ema_multi_avg_fn(averages.decay)
    sizes = {name: shard.parameters[name].nbytes for name in due}
    most = CHUNK if training.spilled is not None else max(1, sum(sizes.values()))
    for names in list(in_rows(sizes, most)):
        for name in names:
            if shard.parameters[name]._version != due[name]:
                raise TaskgradError(
                    f"a layer or a hook wrote the parameter {name!r} itself, as nn.Embedding does "
                    "with max_norm: EMA averages what the optimizer's steps leave, which that "
                    "changed too early. Train without EMA, or without what writes it"
                )
        current = {name: shard.parameters[name].detach() for name in names}
        part = dict(current)
        if averages.updates > 0:
            part = {name: averages.values[name] for name in names}
            for dtype in dict.fromkeys(value.dtype for value in current.values()):
                alike = [name for name in names if current[name].dtype is dtype]
                update([part[n] for n in alike], [current[n] for n in alike], averages.updates)
        if training.spilled is not None:
            training.spilled.put_away(part)
        for name, value in part.items():
            averages.values[name] = value.clone() if value is current[name] else value
            del due[name]
    averages.updates, averages.due = averages.updates + 1, None


def averaged_steps(store: Store, token: str) -> int:
    """The number of the optimizer's steps that the shard's averages are of."""
    with store.locked(token) as shard:
        average(shard)
        training = shard.training
        return 0 if training is None or training.averages is None else training.averages.updates


def exchange_averages(store: Store, token: str, *, applied: bool) -> None:
    """Exchange parameters and averages in place, unless they are `applied` as they should be."""
    with store.locked(token) as shard, torch.no_grad():
        average(shard)
        training = shard.training
        if training is None or training.averages is None:
            return
        averages = training.averages
        for name, value in averages.values.items():
            if (name in averages.applied) != applied:
                parameter = shard.parameters[name]
                before = parameter.clone()
                parameter.copy_(value)
                value.copy_(before)
                averages.applied ^= {name}
                if training.spilled is not None:
                    training.spilled.free_pages_of(value)
