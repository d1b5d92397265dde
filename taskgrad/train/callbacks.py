"""What a user may have called while a trainer trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskgrad.train.loss import StepLoss
    from taskgrad.train.trainer import Trainer


class Callback:
    """Base of callbacks: override what you need. They run on the driver, between steps.

    Examples
    --------
    >>> import taskgrad as tg
    >>> class Losses(tg.Callback):
    ...     def __init__(self):
    ...         self.values = []
    ...     def on_step(self, trainer, loss):
    ...         self.values.append(loss.item())
    """

    def on_step(self, trainer: Trainer, loss: StepLoss) -> None:
        """A step is done; its loss is there. The next one already runs."""

    def on_epoch(self, trainer: Trainer, epoch: int, results: dict[str, float]) -> None:
        """An epoch of `Trainer.fit` is done, counted from 0; no step runs."""
