"""A training step where the parameters live: begin, prepare, commit, or roll back.

A step is two-phased, as a database's commit is. First a shard says that its gradients are
complete, then it commits: it updates its parameters. Where gradients are clipped by the norm of all
or scaled, it first waits for the summaries of all shards, from which each computes the same
clipping and scaling. Until all shards have committed, a step can be taken back, from copies that
`begin` and `commit` make; after `optimizing.settle` their memory serves the next step's copies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.errors import TaskgradError
from taskgrad.worker import averaging, deferred_norm
from taskgrad.worker.failures import update_errors
from taskgrad.worker.offload import CopiesInFiles
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store
from taskgrad.worker.training_state import Before, Summary, Training, Update
from taskgrad.worker.undo import Undo, untouched_by

_HALF = (torch.bfloat16, torch.float16)


def training_of(shard: ResidentShard) -> Training:
    """The state of the shard's trainer; RuntimeError if it has none."""
    if shard.training is None:
        raise RuntimeError("this shard has no trainer")
    return shard.training


def begin(shard: ResidentShard, step: int) -> None:
    """Copy what the step will write before it commits: buffers, and gradients so far."""
    training = training_of(shard)
    if training.begun == step:  # an earlier microbatch began it, or Dask runs this again
        return
    if training.replicated:
        _refuse_stray_gradients(shard, training)
    training.begun = step
    training.summary = None
    training.began_at = time.time()
    training.busy = 0.0
    if training.norms:
        training.norms.clear()
    trained = [shard.parameters[name] for name in training.names]
    training.before = Before(
        training.buffer_copies.of(shard.all_modules.members().buffers),
        training.buffer_copies,
        [(p, None if p.grad is None else p.grad.clone()) for p in trained],
    )


def _refuse_stray_gradients(shard: ResidentShard, training: Training) -> None:
    """Raise TaskgradError if a copy of a parameter has a gradient, which no update would count."""
    homes = set(training.names)
    stray = [n for n, p in shard.parameters.items() if n not in homes and p.grad is not None]
    if stray:
        raise TaskgradError(
            f"parameter {stray[0]!r} has a gradient from a backward outside of its trainer, whose "
            "optimizer state for it is with another replica: call chain.zero_grad() before the "
            "next step"
        )


def copy_ahead(store: Store, token: str, *, step: int) -> None:
    """Make the copies that take back a step's update, for which `commit` need not wait then.

    Also average the parameters of the step before, if all shards have made that.
    Copies in files would overwrite those of the step before, if these may be needed yet.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        unsettled = shard.update is not None and shard.update.before is not None
        if training.done == step and not unsettled:
            averaging.average(shard)
        if training.done == step and not (unsettled and isinstance(training.copies, CopiesInFiles)):
            begin(shard, step)
            _copy(shard, training, without=[])  # any parameter may get a gradient yet


def _copy(shard: ResidentShard, training: Training, without: list[torch.Tensor]) -> None:
    """Copy all that an update changes, unless that was done ahead."""
    before = training.before
    if before is not None and before.update is None:
        changing = [shard.optimizer, training.scheduler, training.scaler]
        before.update = Undo(changing, training.copies, without)


def prepare(
    store: Store,
    token: str,
    *factors: float,
    update: bool,
    norms: bool,
    step: int | None = None,
) -> Summary:
    """Summarize the gradients of a step, which are complete here, for the other shards.

    They are multiplied by the `factors`, and divided by the loss scale: once, also if Dask runs the
    task again. The number of the `step` is given if no call has begun it here.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        if step is not None:
            begin(shard, step)
        if training.summary is not None:
            return training.summary
        found: dict[str, torch.Tensor] = {}
        finite = True
        if update:
            grads = {name: shard.parameters[name].grad for name in training.names}
            present = {name: g for name, g in grads.items() if g is not None}
            factor = math.prod(factors) / training.scale
            if factor != 1:
                for grad in present.values():
                    grad.mul_(factor)
            if training.scaler is not None:
                # All kernels first: to read a result waits for those before it.
                flags = [g.isfinite().all() for g in present.values()]
                finite = all(map(bool, flags))
            if norms:
                each = {n: torch.linalg.vector_norm(g, 2.0) for n, g in present.items()}
                found = {n: norm.cpu() for n, norm in each.items()}
        groups = () if shard.optimizer is None else shard.optimizer.param_groups
        rates = tuple(float(group["lr"]) for group in groups if "lr" in group)
        times = training.busy, training.began_at, time.time()
        training.summary = Summary(found, finite, *times, rates, shard.device.type)
        return training.summary


def norm_moments(store: Store, token: str) -> deferred_norm.Given:
    """What a step recorded of batch norms, for the other replicas: all forwards are done here."""
    with store.locked(token) as shard:
        norms = training_of(shard).norms or {}
        return deferred_norm.given(norms, shard.all_modules.members().modules)


def commit(
    store: Store,
    token: str,
    *values: Summary | deferred_norm.Given,
    step: int,
    update: bool,
    clip_norm: float | None,
    clip_value: float | None,
    order: list[str],
    send: list[str],
) -> dict[str, torch.Tensor]:
    """Take the optimizer's step; returns the new values of those parameters that have copies.

    The values are summaries of shards, and what `norm_moments` gives of other replicas of this one.
    With clipping, as `torch.nn.utils.clip_grad_norm_` over all parameters of the model in this
    order. A shard that has committed this step already only returns the values again. If anything
    raises, the shard is as it was before.

    Raises LayerError if clipping, the optimizer or the scheduler raised; TaskgradError if the step
    was taken back in the meantime.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        if training.done <= step:
            if training.begun != step or training.before is None:
                raise TaskgradError(
                    f"step {step} was taken back on worker {store.worker}, because it failed or "
                    "was interrupted: take it again"
                )
            if shard.update is not None:
                shard.update.release()  # the step before: all shards have it
                shard.update = None
            averaging.average(shard)
            before = training.before
            summaries = [value for value in values if isinstance(value, Summary)]
            others = [value for value in values if not isinstance(value, Summary)]
            finite = all(summary.finite for summary in summaries)
            total = None
            if update and clip_norm is not None:
                kinds = {summary.device for summary in summaries}
                # Plain torch's bits: each kind of device adds in an order of its own. Of several
                # kinds the host, so that all shards have the same bits.
                total = total_norm(summaries, order, kinds.pop() if len(kinds) == 1 else "cpu")
            if update:
                _copy(shard, training, untouched_by(shard.optimizer))
            try:
                if update and finite and shard.optimizer is not None:
                    with update_errors(store.worker, step, "clipping"):
                        _clip(shard, training.names, clip_norm, clip_value, total)
                    with update_errors(store.worker, step, "the optimizer"):
                        if training.spilled is not None:
                            training.spilled.step(shard.optimizer)
                        else:
                            shard.optimizer.step()
                if update and training.scaler is not None:
                    training.scaler.update(finite)
                if training.norms is not None:
                    members = shard.all_modules.members()
                    deferred_norm.take(training.norms, members.modules, others)
                    deferred_norm.commit(training.norms)
                if update and finite and training.scheduler and not training.takes_metric:
                    hint = " It steps with every step of the optimizer, not every epoch."
                    with update_errors(store.worker, step, "the lr_scheduler", hint):
                        training.scheduler.step()
            except BaseException:
                before.restore()
                before.update = None
                if training.spilled is not None and shard.optimizer is not None:
                    training.spilled.forget_all_but(shard.optimizer.state)
                raise
            if update:
                for parameter in shard.parameters.values():
                    parameter.grad = None
                averaging.after_update(shard, training)
            training.done, training.begun = step + 1, None
            training.before, shard.update = None, Update(step, before)
        return shard.values(send)


def advance(store: Store, token: str, *, metric: float, done: int) -> None:
    """Step the scheduler with a metric, once after this number of steps (`done`).

    Raises LayerError if the scheduler raised; it is as it was before, and so are the learning
    rates.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        optimizer, advanced = shard.optimizer, training.advanced
        if training.scheduler is None or optimizer is None or (advanced and advanced[0] == done):
            return
        untouched = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [v for state in optimizer.state.values() for v in state.values()]
        untouched += [v for v in kept if isinstance(v, torch.Tensor)]
        undo = Undo([training.scheduler, optimizer], without=untouched)
        try:
            with update_errors(store.worker, done - 1, "the lr_scheduler"):
                training.scheduler.step(metric)
        except BaseException:
            undo.restore()
            raise
        training.advanced = done, undo


def undo_advance(store: Store, token: str, *, done: int) -> None:
    """Undo this shard's scheduler step with a metric: another shard's scheduler raised."""
    with store.locked(token) as shard:
        training = training_of(shard)
        if training.advanced is not None and training.advanced[0] == done:
            training.advanced[1].restore()
            training.advanced = None


def total_norm(
    summaries: Sequence[Summary], order: Sequence[str], device: str = "cpu"
) -> torch.Tensor:
    """The norm of all gradients together; each parameter counts once, where it lives."""
    norms = {name: norm for summary in summaries for name, norm in summary.norms.items()}
    found = [norms[name] for name in order if name in norms]
    if not found:
        return torch.zeros((), device="cpu")
    return torch.linalg.vector_norm(torch.stack(found).to(device), 2.0)


def _clip(
    shard: ResidentShard,
    names: Sequence[str],
    norm: float | None,
    value: float | None,
    total: torch.Tensor | None,
) -> None:
    parameters = [shard.parameters[name] for name in names]
    if norm is not None and total is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, norm, total)
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)


def progress(store: Store, token: str) -> int | None:
    """The number of steps that this shard has taken; None if it has no trainer."""
    with store.locked(token) as shard:
        return None if shard.training is None else shard.training.done


def roll_back(store: Store, token: str, *, done: int) -> None:
    """Take back the step under way, and the last one if more than `done` steps were taken.

    Raises TaskgradError if the step can no longer be taken back.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        if training.begun is not None and training.before is not None:
            training.before.restore()
        training.begun = training.before = training.summary = None
        if training.done > done:
            update = shard.update
            if update is None or update.before is None or training.done != done + 1:
                raise TaskgradError(
                    f"worker {store.worker} has taken {training.done} steps and cannot undo the "
                    f"last ones; other workers have taken {done}. Restore a checkpoint"
                )
            update.before.restore()
            if training.averages is not None:
                training.averages.due = None
            training.done = done
        averaging.put_back(shard)
        shard.update = None


def report(store: Store, token: str, *values: Any, **about: Any) -> dict[str, Any]:
    """`report_of` as a function on a shard."""
    return report_of(values, **about)


def report_of(
    values: Sequence[Any],
    *,
    step: int,
    weights: list[float] | None,
    order: list[str] | None,
    workers: list[str],
    groups: list[str],
) -> dict[str, Any]:
    """A step in numbers, as `StepLoss.report` has them; all but the time spent waiting.

    The values are the losses of the microbatches, then their shares of the batch if they are not
    among the arguments, then the `Summary` of the shard on each of the workers. A loss without a
    share counts for nothing, whatever it is.
    """
    summaries = [value for value in values if isinstance(value, Summary)]
    numbers = list(values[: len(values) - len(summaries)])
    if weights is None:
        half = len(numbers) // 2
        numbers, weights = numbers[:half], numbers[half:]
    numbers = [n.float() if n.dtype in _HALF else n for n in numbers]  # to add many of them up
    first, *rest = [loss * w for loss, w in zip(numbers, weights, strict=True) if w]
    loss = sum(rest, first)
    span = max(s.ended_at for s in summaries) - min(s.began_at for s in summaries)
    busy = sum(s.busy for s in summaries) / len(summaries)
    rates = max((summary.learning_rates for summary in summaries), key=len)
    if len(rates) != len(groups):  # the function that makes the optimizer makes groups of its own
        groups = [str(i) for i in range(len(rates))]
    return {
        "step": step,
        "loss": float(loss),
        "grad_norm": None if order is None else float(total_norm(summaries, order)),
        "learning_rates": dict(zip(groups, rates, strict=True)),
        "skipped": not all(summary.finite for summary in summaries),
        "bubble": min(1.0, max(0.0, 1 - busy / span)) if span > 0 else math.nan,
        "seconds": span,
        "busy": {worker: s.busy for worker, s in zip(workers, summaries, strict=True)},
    }
