"""The loss of a step: a number that may still be on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StepLoss:
    """The loss of a batch, as `Trainer.step` returns it: fetched when it is read.

    ``float(loss)``, ``loss.item()`` and ``f"{loss:.3f}"`` wait for the step; ``loss.done`` and
    printing do not.
    """

    def __init__(
        self, finish: Callable[[StepLoss], None], number: int, size: int | None, running: Any
    ) -> None:
        self.step = number
        """The number of the step, counted from 0."""
        self.size = size
        """The number of samples of the batch; None if it is on a worker."""
        self.running = running  # what the trainer knows the step by
        self._finish = finish  # waits for this step
        self._report: dict[str, Any] | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """True if reading it does not wait."""
        return self._report is not None

    def item(self) -> float:
        """The loss; waits for the step. Raises what `Trainer.step` does."""
        return float(self.report["loss"])

    @property
    def report(self) -> dict[str, Any]:
        """The step in numbers; waits for it.

        ``loss``; ``grad_norm`` before clipping (None without); ``bubble``, the share of the time
        from a worker's first action in the step to its last, its waits included, in which it did
        not compute, over all workers; ``skipped``, whether fp16 gradients overflowed and the
        optimizer took no step. Compiled steps also have ``busy`` and ``waiting``: for each worker
        the seconds in which it computed, and in which it waited for values of others.
        """
        if self._report is None:
            self.raise_error()
            self._finish(self)
        assert self._report is not None
        return self._report

    def settle(self, report: dict[str, Any]) -> None:
        """The step is done."""
        self._report = report

    def fail(self, error: BaseException) -> None:
        """The step will not be done."""
        self._error = error

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
