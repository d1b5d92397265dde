"""Over a whole loader: fit, evaluate, predict."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from taskgrad.graph.slices import as_tensors, batch_size
from taskgrad.thunk import Thunk, collect, spawn
from taskgrad.train.data import check_size, on_workers, pair

if TYPE_CHECKING:
    from taskgrad.train.loss import StepLoss
    from taskgrad.train.trainer import Trainer

Metrics = Mapping[str, Callable[..., Any]]

# How many batches are on the way at a time where nothing is trained: the shards' work overlaps.
_ON_THE_WAY = 4


def fit(
    trainer: Trainer,
    loader: Iterable[Any],
    epochs: int,
    val_loader: Iterable[Any] | None,
    metrics: Metrics,
    progress: bool,
) -> list[dict[str, float]]:
    """Train for some epochs; see `Trainer.fit`."""
    if trainer._metric_for is not None and val_loader is None:
        raise ValueError(
            f"the lr_scheduler is a {trainer._metric_for}, which needs a metric: it is given the "
            "validation loss after each epoch, so fit needs a val_loader"
        )
    history = []
    for epoch in range(epochs):
        trainer._in_fit = True
        try:
            results = _epoch(trainer, loader, f"epoch {epoch + 1}/{epochs}", progress)
        finally:
            trainer._in_fit = False
        if val_loader is not None:
            found = evaluate(trainer, val_loader, metrics)
            results |= {f"val_{name}": value for name, value in found.items()}
            if trainer._metric_for is not None:
                trainer._advance(results["val_loss"])
        history.append(results)
        for callback in trainer.callbacks:
            callback.on_epoch(trainer, epoch, results)
    return history


def _epoch(trainer: Trainer, loader: Iterable[Any], title: str, progress: bool) -> dict[str, float]:
    means: list[tuple[float, int | None]] = []
    samples = 0
    waiting: deque[StepLoss] = deque()
    start = time.perf_counter()
    with _bar(loader, title) if progress else nullcontext() as bar:

        def note(loss: StepLoss) -> None:
            nonlocal samples
            means.append((loss.item(), loss.size))
            samples += loss.size or 0
            if bar is not None:
                seconds = time.perf_counter() - start
                shown = {"loss": f"{loss:.4g}", "bubble": f"{loss.report['bubble']:.0%}"}
                if loss.size:
                    shown["samples/s"] = f"{samples / seconds:.4g}"
                bar.set_postfix(shown, refresh=False)
                bar.update()

        try:
            for item in loader:
                x, y = pair(item, "the loader")
                waiting.append(trainer.step(x, y))
                while waiting and waiting[0].done:
                    note(waiting.popleft())
        except Exception:
            trainer.wait()  # what was given to it before is trained on
            raise
        except BaseException as error:  # Ctrl-C
            trainer._give_up(error)
            raise
        trainer.wait()
        for loss in waiting:
            note(loss)
    if not means:
        raise ValueError(
            "the loader yielded no batches: it is empty, or an iterator that an earlier epoch used "
            "up. Give something that can be iterated over again, such as a DataLoader or a list"
        )
    sizes = [size for _, size in means]
    known = [size for size in sizes if size is not None]
    weights = known if len(known) == len(sizes) else [1] * len(sizes)
    return {"loss": _mean([of for of, _ in means], weights, trainer._cutter.weighted)}


def _bar(loader: Iterable[Any], title: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=len(loader) if isinstance(loader, Sized) else None, desc=title, unit="step")


def _measure(
    functions: Mapping[str, Callable[..., Any]],
    dims: Any,
    size: int | None,
    output: Any,
    targets: Any,
) -> tuple[dict[str, float], int]:
    """What each function gives for a batch, and how many samples that has.

    That is `size` where the targets do not say.
    """
    targets = as_tensors(targets)
    own = batch_size(targets, dims, "the targets")
    size = check_size(size if own is None else own, targets)
    found = {name: float(function(output, targets)) for name, function in functions.items()}
    return found, size


def _inputs_size(dims: Any, x: Any) -> int | None:
    try:
        return batch_size(as_tensors(x), dims, "the inputs")
    except ValueError:  # the targets may say
        return None


def evaluate(trainer: Trainer, loader: Iterable[Any], metrics: Metrics) -> dict[str, float]:
    """Mean loss and metrics over a loader; see `Trainer.evaluate`."""
    functions = {"loss": trainer._loss_fn, **metrics}
    cutter = trainer._cutter
    measure = partial(_measure, functions, cutter.target_dims)
    count = partial(_inputs_size, cutter.in_dims)

    def start(item: Any) -> Thunk:
        x, y = pair(item, "the loader")
        there = on_workers(x)
        size = spawn(count, x, worker=cutter.first) if there else count(x)
        return spawn(measure, size, _forward(trainer, x), y, worker=cutter.last)

    values: dict[str, list[float]] = {name: [] for name in functions}
    sizes: list[int] = []
    for found, size in _stream(trainer, loader, start):
        sizes.append(size)
        for name, value in found.items():
            values[name].append(value)
    if not sizes:
        raise ValueError("the loader yielded no batches to evaluate on")
    return {
        name: _mean(of, sizes, name != "loss" or cutter.weighted) for name, of in values.items()
    }


def _mean(values: list[float], sizes: list[int], means: bool) -> float:
    """The mean over samples of what are means over the samples of each batch, or else sums."""
    total = sum(v * n if means else v for v, n in zip(values, sizes, strict=True))
    return total / sum(sizes)


def predict(trainer: Trainer, loader: Iterable[Any]) -> Iterator[Any]:
    """Outputs for the batches of a loader, in order; see `Trainer.predict`."""
    return _stream(trainer, loader, partial(_forward, trainer))


def _forward(trainer: Trainer, x: Any) -> Thunk:
    """The model in evaluation mode, whatever mode the chain is in."""
    if not isinstance(x, Thunk):
        x = as_tensors(x)
    chain = trainer.chain
    calls = chain._calls((x,), {}, mode=False, autocast=trainer._settings.autocast)
    return Thunk(calls[-1], chain._session)


def _stream(
    trainer: Trainer, loader: Iterable[Any], start: Callable[[Any], Thunk]
) -> Iterator[Any]:
    """Values of the thunks that are started for the items, in order, some at a time on the way."""
    trainer.wait()
    running: deque[Thunk] = deque()
    items = iter(loader)
    while True:
        # Not around the yield: the caller is in its own grad mode there.
        with torch.no_grad():
            for item in itertools.islice(items, _ON_THE_WAY - len(running)):
                with trainer._turn():
                    trainer.wait()  # for steps that were taken meanwhile
                    running.append(start(item).persist())
                    trainer._reading.add(running[-1]._node)
            if not running:
                return
            value = collect(running[0])
        running.popleft()
        yield value
