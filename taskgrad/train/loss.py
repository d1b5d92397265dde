"""The loss of a step: a number that may still be on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskgrad.train.data import Batch


class StepLoss:
    """The loss of a batch, as `Trainer.step` returns it: fetched when it is read.

    ``float(loss)``, ``loss.item()`` and ``f"{loss:.3f}"`` wait for the step; ``loss.done`` and
    printing do not.
    """

    def __init__(
        self, finish: Callable[[StepLoss], None], number: int, batch: Batch, running: Any
    ) -> None:
        self.step = number
        """The number of the step, counted from 0."""
        self.size = batch.size
        """The number of samples of the batch; None if it is on a worker."""
        self.weight = batch.weight
        """What it counts for in a mean over steps: its ``loss_weight``, or else its `size`."""
        self.running = running  # what the trainer knows the step by
        self.is_read = False  # True if a callback will read the state after this step
        self.may_be_read = False  # the same, or it is not known yet
        self._batch: Batch | None = batch  # until the step is done
        self._finish = finish  # waits for this step
        self._report: dict[str, Any] | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """True if reading it does not wait."""
        return self._report is not None

    def item(self) -> float:
        """The loss; waits for the step. Raises what `Trainer.step` does."""
        loss: float = self.report["loss"]
        return loss

    @property
    def report(self) -> dict[str, Any]:
        """The step in numbers, plain ones; waits for it.

        ``step``, its number; ``loss``; ``learning_rates`` that it was taken with, by the patterns
        of ``param_groups``, the rest as "default"; ``grad_norm`` before clipping (None without
        ``clip_norm``; with ``clip_norm=math.inf`` it is only measured); ``skipped``, True if fp16
        gradients overflowed and the optimizer took no step; ``seconds`` from a worker's first
        action in the step to its last, of the slowest worker; ``busy``, for each worker the seconds
        in which it computed; ``bubble``, the share of these times in which workers did not compute,
        their waits included. Compiled steps also have ``waiting``: for each worker the seconds in
        which it waited for values of others.
        """
        if self._report is None:
            self.raise_error()
            self._finish(self)
        assert self._report is not None
        return self._report

    @property
    def batch(self) -> Batch:
        """The batch of a step that is not done."""
        assert self._batch is not None
        return self._batch

    def settle(self, report: dict[str, Any]) -> None:
        """The step is done."""
        self._report, self._batch = report, None

    def fail(self, error: BaseException) -> None:
        """The step will not be done, unless it is."""
        if not self.done:
            self._error, self._batch = error, None

    def raise_error(self) -> None:
        """Raise why the step will not be done, if that is known."""
        if self._error is not None:
            raise self._error

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __repr__(self) -> str:
        if self._report is not None:
            return f"StepLoss({self.item():.6g}, step {self.step})"
        return f"StepLoss(step {self.step}, {'failed' if self._error else 'on its way'})"
