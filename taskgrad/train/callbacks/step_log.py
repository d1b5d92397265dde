"""The base of loggers that write a row a step, also when a training is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskgrad.train.callbacks.base import Callback
from taskgrad.train.loss import StepLoss


class StepLog(Callback):
    """Base of loggers: a training that goes on from a checkpoint goes on in its log too."""

    def __init__(self) -> None:
        self._next: int | None = None  # the step to be logged next, once something was logged

    def open_at(self, step: int) -> None:
        """Begin to log at this step: nothing that was logged from it on is true any more."""
        raise NotImplementedError

    def log_step(self, trainer: Any, loss: StepLoss) -> None:
        """Log a step."""
        raise NotImplementedError

    def log_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Log an epoch."""
        raise NotImplementedError

    def on_fit_begin(self, trainer: Any) -> None:
        """Go on at the trainer's step."""
        self._go_on(trainer.steps)

    def on_step(self, trainer: Any, loss: StepLoss) -> None:
        """Log the step."""
        self._go_on(loss.step)
        self.log_step(trainer, loss)
        self._next = loss.step + 1

    def on_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Log the epoch, unless `Trainer.stop` ended it before its end: a resumed fit ends it."""
        if trainer.epoch != epoch:  # but the next one
            self.log_epoch(trainer, epoch, results)

    def _go_on(self, step: int) -> None:
        if self._next is None or step < self._next:
            self.open_at(step)
            self._next = step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at the step of the checkpoint."""
        self._next = None


def columns(loss: StepLoss) -> dict[str, float | None]:
    """The numbers of a step that loggers write, by name."""
    report = loss.report
    rates = {f"learning_rate/{name}": rate for name, rate in report["learning_rates"].items()}
    rest = {name: report[name] for name in ("grad_norm", "bubble", "seconds")}
    return {"loss": report["loss"], **rates, **rest}
