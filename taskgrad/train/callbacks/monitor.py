"""The monitored result of each epoch, and the best of them so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from taskgrad.arguments import shown
from taskgrad.train.callbacks.base import Callback


class Monitor(Callback):
    """Base of callbacks that compare one result of each epoch with the best one so far.

    A result that is not a number (NaN) is never the best.

    Attributes
    ----------
    best : float or None
        The best result so far; None before there is one.
    best_epoch : int or None
        Its epoch of `Trainer.fit`.
    """

    def __init__(self, monitor: str | None, mode: str, min_delta: float = 0.0) -> None:
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f'monitor is the name of a result, as "val_loss"; got {shown(monitor)}')
        if mode not in ("min", "max"):
            raise ValueError(f'mode is "min" or "max"; got {shown(mode)}')
        if isinstance(min_delta, bool) or not isinstance(min_delta, int | float):
            raise TypeError(f"min_delta is a number; got {shown(min_delta)}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta is a finite number from 0 on; got {shown(min_delta)}")
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self.best_epoch: int | None = None

    def improved(self, trainer: Any, epoch: int, results: Mapping[str, float]) -> bool | None:
        """Compare the results of an epoch with the best so far; True if they are the best now.

        None if there is nothing to compare: `Trainer.stop` ended the epoch before its end.
        """
        if trainer.epoch == epoch:  # and not the next one
            return None
        if self.monitor is None:  # from here on: a later fit may have other results
            self.monitor = "val_loss" if "val_loss" in results else "loss"
        if self.monitor not in results:
            raise ValueError(
                f"{type(self).__name__} monitors {self.monitor!r}, and there is no such result of "
                f"epoch {epoch}; there is {', '.join(map(repr, results))}. Results that start with "
                "val_ need a val_loader"
            )
        value = float(results[self.monitor])
        if math.isnan(value):
            return False
        if self.best is not None:
            gain = self.best - value if self.mode == "min" else value - self.best
            if not gain > self.min_delta:
                return False
        self.best, self.best_epoch = value, epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best result so far."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the best result so far, unless another one is monitored now."""
        if self.is_of(state):
            self.monitor = state["monitor"]
            self.best, self.best_epoch = state["best"], state["best_epoch"]

    def is_of(self, state: Mapping[str, Any]) -> bool:
        """True if what was saved is of the result that is monitored now."""
        return self.monitor in (None, state["monitor"]) and self.mode == state["mode"]
