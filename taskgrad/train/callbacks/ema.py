"""An exponential moving average of the weights, which stays on the workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from taskgrad.arguments import flag, shown
from taskgrad.errors import TaskgradError
from taskgrad.layout import Layout
from taskgrad.train.callbacks.base import Callback
from taskgrad.worker import averaging


class EMA(Callback):
    """Keeps an exponential moving average of the weights, where they are: none of them travels.

    After each step of the optimizer ``average = decay * average + (1 - decay) * weight``, beginning
    with the weights after the first one. The bits are those of `torch.optim.swa_utils`:
    ``AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))``, with ``update_parameters``
    after each ``optimizer.step()``. With ``accumulate`` that is not after each batch; a step of
    which fp16 finds gradients that are not finite counts, as it does in a loop that calls
    ``update_parameters`` after ``scaler.step``. Buffers are the model's own, as of now. A worker
    holds one more copy of its trainable parameters; see `GraphChain.memory`, under optimizer.

    Checkpoints have the averages. A trainer that is restored with this callback goes on with them;
    if there are none, with a warning, it begins with its next step; without this callback they are
    dropped.

    Parameters
    ----------
    decay : float
        Between 0 and 1, how much of the average a step keeps.
    validate : bool
        The validation in `Trainer.fit` is of the averages, if there are any yet.

    Examples
    --------
    >>> import functools, torch, taskgrad as tg
    >>> from torch.nn.functional import mse_loss
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
    >>> ema = tg.EMA(decay=0.9)
    >>> trainer = tg.Trainer(chain, mse_loss, sgd, callbacks=[ema])
    >>> history = trainer.fit([(torch.ones(4, 2), torch.zeros(4, 1))] * 3, progress=False)
    >>> with ema.applied(trainer):
    ...     averaged = chain.to_module()
    >>> torch.equal(averaged[0].weight, chain.to_module()[0].weight)
    False
    >>> client.close()
    """

    def __init__(self, decay: float = 0.999, *, validate: bool = True) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"decay is a number between 0 and 1; got {shown(decay)}")
        if not 0 < decay < 1:
            raise ValueError(f"decay is between 0 and 1, and neither of them; got {decay}")
        self.decay = float(decay)
        self.validate = flag("validate", validate)
        self._validation = contextlib.ExitStack()

    @contextlib.contextmanager
    def applied(self, trainer: Any) -> Iterator[None]:
        """A block in which the averages are in the place of the weights, on all workers.

        The chain's ``state_dict``, ``to_module`` and calls, and the trainer's `evaluate` and
        `predict` see them. At the end the weights come back as they were, to the bit, also if the
        block raises. Steps, `save`, `restore` and ``load_state_dict`` are refused in it, in
        whatever thread.

        Raises
        ------
        ValueError
            This is no callback of the trainer.
        TaskgradError
            The optimizer has not taken a step yet; or this is in such a block already.
        LayerError, WorkerLostError
            A step that still ran failed, or a worker is gone.
        """
        if all(callback is not self for callback in trainer.callbacks):
            raise ValueError("this EMA is not among the callbacks of the trainer")
        layout: Layout = trainer.layout
        with trainer._steps.alone():
            layout.refuse_averages("EMA.applied")
            if not _averaged_steps(trainer):
                raise TaskgradError(
                    "there is no average of the weights yet: the first one is made after the first "
                    "step of the optimizer"
                )
            _mark(layout, averages=True)
            try:
                _exchange(layout, applied=True)
            except BaseException:
                _put_back(trainer)
                raise
        try:
            yield
        finally:
            _put_back(trainer)

    def on_validation_begin(self, trainer: Any) -> None:
        """Put the averages in place."""
        if self.validate and _averaged_steps(trainer):
            self._validation.enter_context(self.applied(trainer))

    def on_validation_end(self, trainer: Any, results: dict[str, float]) -> None:
        """Put the weights back."""
        self._validation.close()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Put the weights back if the validation raised."""
        self._validation.close()


def ema_of(callbacks: Iterable[Any]) -> EMA | None:
    """The one EMA among these callbacks, if there is one; ValueError if there are several."""
    found = [callback for callback in callbacks if isinstance(callback, EMA)]
    if len(found) > 1:
        raise ValueError(f"callbacks has {len(found)} EMA: a trainer keeps one average")
    return found[0] if found else None


def _averaged_steps(trainer: Any) -> int:
    """The number of the optimizer's steps that the averages are of."""
    layout: Layout = trainer.layout
    with trainer._steps.alone():
        return min(layout.results(layout.tasks(averaging.averaged_steps)))


def _mark(layout: Layout, *, averages: bool) -> None:
    for ref in layout.refs:
        ref.has_averages = averages


def _exchange(layout: Layout, *, applied: bool) -> None:
    layout.run(layout.tasks(averaging.exchange_averages, applied=applied))
    layout.copy_tied()


def _put_back(trainer: Any, tries: int = 2) -> None:
    """Put the weights back in their place; once more if that is interrupted."""
    layout: Layout = trainer.layout
    try:
        with trainer._steps.alone():
            _exchange(layout, applied=False)
            _mark(layout, averages=False)
    except BaseException:
        if tries > 1:
            _put_back(trainer, tries - 1)
        raise
