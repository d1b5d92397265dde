"""`Trainer.fit`: epochs of steps, validation, callbacks and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from taskgrad.train.batch_form import BatchForm
from taskgrad.train.fit_state import FitState
from taskgrad.train.loss import StepLoss
from taskgrad.train.repeating import (
    checksum,
    loader_state,
    random_states,
    resumed,
    set_epoch,
)
from taskgrad.train.steps import Steps


@dataclass(frozen=True)
class Fit:
    """The arguments of `Trainer.fit`, and what it uses of its trainer.

    `call` calls a method of all callbacks, `monitor` names the result that a learning-rate
    scheduler is given.
    """

    steps: Steps
    form: BatchForm
    step: Callable[[Any, Any], StepLoss]
    evaluate: Callable[[Iterable[Any]], dict[str, float]]
    call: Callable[..., None]
    monitor: str
    loader: Iterable[Any]
    epochs: int
    val_loader: Iterable[Any] | None
    progress: bool

    def run(self, state: FitState, saved: Mapping[str, Any] | None) -> list[dict[str, float]]:
        """Train from this state on, which is from a checkpoint if that is `saved`."""
        self._check_monitor()
        self.call("on_fit_begin")
        history = state.history
        while state.epoch < self.epochs and not state.stopped:
            self.call("on_epoch_begin", state.epoch)
            if state.stopped:
                break
            title = f"epoch {state.epoch + 1}/{self.epochs}"
            with _Bar(self.loader, title, state.skipped, shown=self.progress) as bar:
                with self.steps.in_fit():
                    self._train(state, saved, bar)
                saved = None
                if not state.mean.batches:  # stopped before the first
                    break
                results = self._results(state)
                bar.close_with(results)
            epoch, history = state.epoch, [*state.history, results]
            if not state.stopped:
                state.next_epoch(results)
            self.call("on_epoch", epoch, results)
        self.call("on_fit_end", history)
        return history

    def _check_monitor(self) -> None:
        steps = self.steps
        if steps.metric_for is not None and self.val_loader is None and self.monitor != "loss":
            raise ValueError(
                f"the lr_scheduler is a {steps.metric_for}, which needs a metric: it is given "
                f"{self.monitor!r} after each epoch, so fit needs a val_loader"
            )

    def _results(self, state: FitState) -> dict[str, float]:
        """The results of the epoch that was trained: its mean loss, and validation."""
        results = {"loss": state.mean.value}
        if state.stopped:
            return results
        if self.val_loader is not None:
            self.call("on_validation_begin")
            found = {f"val_{name}": v for name, v in self.evaluate(self.val_loader).items()}
            self.call("on_validation_end", found)
            results |= found
        if self.steps.metric_for is not None:
            if self.monitor not in results:
                raise ValueError(
                    f"monitor is {self.monitor!r}, and an epoch has the results "
                    f"{', '.join(results)}"
                )
            self.steps.advance(results[self.monitor])
        return results

    def _train(self, state: FitState, saved: Mapping[str, Any] | None, bar: _Bar) -> None:
        """Train on every batch of an epoch; waits until all of its steps are done."""
        try:
            for x, y in self._batches(state, saved):
                self.steps.make_room()
                if state.stopped:
                    break
                state.submitted(self.step(x, y))
                while state.waiting and state.waiting[0].done:
                    _note(state, bar)
                if state.stopped:
                    break
        except Exception:
            self.steps.wait()  # what was given to it before is trained on
            raise
        except BaseException as error:  # Ctrl-C
            self.steps.abort(error)
            raise
        self.steps.wait()
        while state.waiting:
            _note(state, bar)
        if not state.mean.batches and not state.stopped:
            raise ValueError(
                "the loader yielded no batches: it is empty, or an iterator that an earlier epoch "
                "used up. Give something that can be iterated over again, such as a DataLoader or "
                "a list"
            )

    def _batches(self, state: FitState, saved: Mapping[str, Any] | None) -> Iterator[Any]:
        """The batches of an epoch that are not trained on yet: inputs and targets."""
        set_epoch(self.loader, state.epoch)
        if saved is None:
            state.random = random_states(self.loader)
            items = iter(self.loader)
        else:
            items = resumed(self.loader, saved)
            state.random = saved["random"]
        for item in items:
            state.drew(checksum(item), loader_state(self.loader))
            yield self.form.of_item(item, "the loader")


def _note(state: FitState, bar: _Bar) -> None:
    """The first of the losses that were waited for is there."""
    loss = state.waiting.popleft()
    state.mean.add(loss.item(), loss.weight)
    bar.add(loss)


class _Bar:
    """A progress bar of one epoch; nothing if it is not shown, or tqdm is not there."""

    def __init__(self, loader: Iterable[Any], title: str, skipped: int, *, shown: bool) -> None:
        self._bar: Any = nullcontext()
        self._start = time.perf_counter()
        self._samples = 0
        self._shown: dict[str, str] = {}
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            total = len(loader) if isinstance(loader, Sized) else None
            self._bar = tqdm(total=total, desc=title, unit="step", initial=skipped)

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        self._bar.__exit__(*about)

    def add(self, loss: StepLoss) -> None:
        """A step is done."""
        if isinstance(self._bar, nullcontext):
            return
        self._shown |= {"loss": f"{loss:.4g}", "bubble": f"{loss.report['bubble']:.0%}"}
        if loss.size:
            self._samples += loss.size
            speed = self._samples / (time.perf_counter() - self._start)
            self._shown["samples/s"] = f"{speed:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def close_with(self, results: Mapping[str, float]) -> None:
        """The results of the epoch, which stay when the bar is closed."""
        if not isinstance(self._bar, nullcontext):
            found = {name: f"{value:.4g}" for name, value in results.items()}
            self._bar.set_postfix(self._shown | found)
