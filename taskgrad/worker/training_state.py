"""The state of a trainer on a shard: of its steps, of the loss scale, of the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.worker.deferred_norm import Statistics
from taskgrad.worker.offload import SpilledState
from taskgrad.worker.undo import Copied, Copies, ReusedCopies, Undo

# As torch.amp.GradScaler.
_FIRST_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000


@dataclass
class Scaler:
    """The factor that keeps small gradients from being zero in float16, on all shards the same."""

    scale: float = _FIRST_SCALE
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """After a step: less if a gradient was not finite, more after many that were."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale *= _BACKOFF
        elif self.good_steps == _INTERVAL:
            self.scale, self.good_steps = self.scale * _GROWTH, 0


@dataclass
class Before:
    """A shard before a step: its buffers and gradients, and what its update will change."""

    buffers: list[Copied]
    copies: Copies  # of the buffers
    gradients: list[tuple[nn.Parameter, torch.Tensor | None]]
    update: Undo | None = None

    def restore(self) -> None:
        """Restore all of it."""
        if self.update is not None:
            self.update.restore()
        with torch.no_grad():
            for buffer, _, before in self.buffers:
                buffer.copy_(before)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def release(self) -> None:
        """Give the copies back: nothing is to be restored."""
        if self.update is not None:
            self.update.release()
        self.copies.take_back(self.buffers)
        self.buffers = []


@dataclass
class Update:
    """The last step of a shard's optimizer; `before` takes it back.

    Once it is `settled`, all shards have made it.
    """

    number: int
    before: Before | Undo | None
    settled: bool = False

    def release(self) -> None:
        """Give the copies back: the step is not to be taken back."""
        if self.before is not None:
            self.before.release()
            self.before = None


@dataclass(frozen=True)
class TrainingOptions:
    """A trainer's options for one shard.

    `names` are the trainable parameters that live there, `monitor` is the result of an epoch that a
    scheduler with a metric is given. `deferred` defers batch norm's statistics;
    with `compiled`, options of ``torch.compile``, each layer is compiled at its first call.
    `in_files` has "state" if the optimizer's state is in files, "undo" if copies for taking a
    step back do. `loss` is the packed loss function, where the model's output is. `decay` is that
    of the parameters' averages, None without. The shard is `replicated` if there are several
    replicas.
    """

    names: list[str]
    scheduler: Callable[..., Any] | None
    scaled: bool
    deferred: bool
    monitor: str
    compiled: dict[str, Any] | None
    in_files: frozenset[str] = frozenset()
    loss: bytes = b""
    decay: float | None = None
    replicated: bool = False


@dataclass
class Averages:
    """Exponential moving averages of a shard's trainable parameters, after so many `updates`.

    `due` are the parameters of the last step, yet to be averaged, with the count of writes to each;
    None if there are none. `applied` are those that were exchanged with their averages.
    """

    decay: float
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    updates: int = 0
    due: dict[str, int] | None = None
    applied: set[str] = field(default_factory=set)


@dataclass
class Training:
    """The state of a trainer on one shard, without its optimizer.

    `names` are the trainable parameters that live here. `done` is the number of steps that were
    taken, `begun` the index of the one under way, which `before` takes back. `written` is a
    parameter that a layer of a `replicated` shard has written.
    """

    names: list[str]
    scheduler: Any = None
    takes_metric: bool = False  # True if the scheduler's step does, at the end of an epoch
    scaler: Scaler | None = None
    # Where the optimizer's state and the averages are, if not in memory.
    spilled: SpilledState | None = None
    averages: Averages | None = None
    copies: Copies = field(default_factory=ReusedCopies)  # makes those that undo an update
    buffer_copies: Copies = field(default_factory=ReusedCopies)
    done: int = 0
    begun: int | None = None
    before: Before | None = None
    summary: Summary | None = None  # of the last step that began, once its gradients are complete
    norms: Statistics | None = None  # where batch norm's statistics are deferred
    advanced: tuple[int, Undo] | None = None  # `done` at the scheduler's last step with a metric
    busy: float = 0.0
    began_at: float = 0.0
    replicated: bool = False
    written: str | None = None

    @property
    def scale(self) -> float:
        """The factor by which the loss is multiplied."""
        return 1.0 if self.scaler is None else self.scaler.scale


@dataclass(frozen=True)
class Summary:
    """A shard's gradients in numbers, once they are complete.

    `norms` are by parameter, on the host; `learning_rates` are those of the optimizer's groups in
    this step; `device` is the kind of device that the shard is on.
    """

    norms: dict[str, torch.Tensor]
    finite: bool
    busy: float
    began_at: float
    ended_at: float
    learning_rates: tuple[float, ...]
    device: str = "cpu"
