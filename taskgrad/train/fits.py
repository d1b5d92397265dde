"""The calls of one trainer's `fit`: which of them runs, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from taskgrad.train.fit_state import EpochMean, FitState
from taskgrad.train.repeating import random_states
from taskgrad.train.steps import Steps


class Fits:
    """The fits of a trainer; a callback of one may begin another.

    `weighted` is False if the loss is a sum over samples.
    """

    def __init__(self, steps: Steps, *, weighted: bool) -> None:
        self._steps = steps
        self._weighted = weighted
        self._running: list[FitState] = []
        self._loader: Any = None  # of the outermost one
        self._unfinished: FitState | None = None  # the last one, if it did not come to its end
        self._to_resume: tuple[Mapping[str, Any], int] | None = None  # that of a checkpoint

    @property
    def epoch(self) -> int:
        """The epoch of the innermost fit; 0 if none runs."""
        return self._running[-1].epoch if self._running else 0

    @contextmanager
    def begun(self, loader: Any) -> Iterator[tuple[FitState, Mapping[str, Any] | None]]:
        """A fit runs in the block: its state, and what a checkpoint had of it if it is resumed."""
        saved, steps = self._to_resume or (None, 0)
        taken = self._steps.taken_by_now
        if saved is not None and steps == taken:
            state = FitState.restored(saved, taken)
        else:
            saved, state = None, FitState(EpochMean(self._weighted), taken)
        self._to_resume = None
        if not self._running:
            self._loader = loader
        self._running.append(state)
        ended = False
        try:
            yield state, saved
            ended = not state.stopped
        finally:
            self._running.pop()
            if not self._running:
                state.random = state.random or random_states(loader)
                self._unfinished, self._loader = None if ended else state, None

    def stop(self) -> None:
        """End the innermost one; see `Trainer.stop`."""
        for state in self._running[-1:]:
            state.stopped = True
            state.drop(self._steps.drop_ahead())

    def to_save(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the fit that runs, or that has not come to its end."""
        taken = self._steps.taken_by_now
        if self._running:
            state = self._running[0]
        elif self._unfinished is not None and self._unfinished.covers(taken):
            state = self._unfinished
        else:
            return None
        return state.saved(taken, state.random or random_states(self._loader))

    def resume(self, saved: Mapping[str, Any] | None) -> None:
        """The next fit goes on from what `to_save` returned, if no step is taken before."""
        if saved is not None:
            taken = self._steps.taken
            self._to_resume = saved, taken
            self._unfinished = FitState.restored(saved, taken)
