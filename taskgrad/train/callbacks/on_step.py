"""The calls of callbacks' `on_step`: which of them read the state of their step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from taskgrad.train.callbacks.base import Callback
from taskgrad.train.loss import StepLoss


class OnStep:
    """Calls `on_step` of a trainer's callbacks, and knows which of them read the trainer's state.

    The first call of each is made while no later step runs, as is each one of a callback that was
    seen to read the state, or that declares it.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = [
            c for c in callbacks if getattr(type(c), "on_step", None) is not Callback.on_step
        ]
        self._called: set[int] = set()  # positions among the callbacks
        self._readers: set[int] = set()  # those that were seen to read the state
        self._now = threading.local()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def reads(self, step: int) -> bool:
        """True if a callback is known to read the state after this step."""
        return any(i in self._readers or c.reads_state(step) for i, c in enumerate(self._callbacks))

    @property
    def any_uncalled(self) -> bool:
        """True if a callback was never called, so that it is not known if it reads the state."""
        return len(self._called) < len(self._callbacks)

    def call(self, trainer: Any, loss: StepLoss) -> None:
        """Call all of them, in order."""
        for i, callback in enumerate(self._callbacks):
            self._now.calling = i
            self._called.add(i)
            callback.on_step(trainer, loss)

    def note_reader(self) -> str:
        """The callback that runs in this thread reads the state; returns the name of its class."""
        position: int = self._now.calling
        self._readers.add(position)
        return type(self._callbacks[position]).__name__
