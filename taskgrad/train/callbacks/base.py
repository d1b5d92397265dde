"""The base of callbacks: the points of a training at which they are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgrad.train.loss import StepLoss


class Callback:
    """Base of callbacks: override what you need. They run on the driver, in the order given.

    A callback may call the trainer: evaluate, save, stop it, take steps. `trainer` is the
    `Trainer` that calls.

    Examples
    --------
    >>> import taskgrad as tg
    >>> class Losses(tg.Callback):
    ...     def __init__(self):
    ...         self.values = []
    ...     def on_step(self, trainer, loss):
    ...         self.values.append(loss.item())
    """

    def reads_state(self, step: int) -> bool:
        """True if `on_step` of this step reads or changes the model, or anything else trained.

        The next step then begins when `on_step` has returned. Where this is False the next step may
        be under way. If `on_step` then reads the state all the same, the trainer takes the steps
        ahead back, takes them again afterwards, and holds all later ones for this callback; if they
        can no longer be taken back, the read raises `TaskgradError`.
        """
        return False

    def on_fit_begin(self, trainer: Any) -> None:
        """Called when `Trainer.fit` begins; no step runs."""

    def on_fit_end(self, trainer: Any, history: list[dict[str, float]]) -> None:
        """Called when `Trainer.fit` is about to return this history; no step runs."""

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        """Called before an epoch of `Trainer.fit`, counted from 0; no step runs."""

    def on_step(self, trainer: Any, loss: StepLoss) -> None:
        """Called when a step is done, in the order of the steps; see `reads_state`.

        ``loss.report`` has the step in numbers.
        """

    def on_validation_begin(self, trainer: Any) -> None:
        """Called before `Trainer.fit` evaluates the model at the end of an epoch."""

    def on_validation_end(self, trainer: Any, results: dict[str, float]) -> None:
        """Called with ``val_loss`` and the metrics, each with ``val_`` before its name."""

    def on_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Called after an epoch of `Trainer.fit` and its validation; no step runs."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Called when `Trainer.fit` is about to raise this, Ctrl-C included."""

    def on_save(self, trainer: Any, path: Path) -> None:
        """Called after `Trainer.save` has written a checkpoint into this folder."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain Python values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned when the checkpoint was saved."""
