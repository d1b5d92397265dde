"""End a training whose results no longer get better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from taskgrad.arguments import whole
from taskgrad.train.callbacks.monitor import Monitor


class EarlyStopping(Monitor):
    """Stops `Trainer.fit` when a result has not improved for some epochs.

    A result that is not a number (NaN) is no improvement. The best result and the count of epochs
    are kept in checkpoints: a training that was stopped stays stopped when it is restored, unless
    `patience` is larger then. Another call of `fit` counts from zero.

    Parameters
    ----------
    monitor : str, optional
        The name of a result as in the history of `Trainer.fit`; by default ``val_loss`` if there is
        a `val_loader`, else ``loss``.
    mode : {"min", "max"}
        Which results are better: smaller or larger ones.
    patience : int
        After how many epochs in a row without an improvement training ends.
    min_delta : float
        A result is an improvement if it is better than the best one by more than this.

    Attributes
    ----------
    best, best_epoch : float or None, int or None
        The best result so far and its epoch.
    stopped_epoch : int or None
        The epoch after which training ended; None if it was not ended by this callback.

    Raises
    ------
    ValueError
        After an epoch: the results have none of this name; the message lists what there is.

    Examples
    --------
    >>> import functools, torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.0)
    >>> stopping = tg.EarlyStopping(patience=2)
    >>> trainer = tg.Trainer(chain, torch.nn.functional.mse_loss, sgd, callbacks=[stopping])
    >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> len(trainer.fit(batches, epochs=10, val_loader=batches, progress=False))
    3
    >>> stopping.best_epoch, stopping.stopped_epoch
    (0, 2)
    >>> client.close()
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience = whole("patience", patience, least=1)
        self.stopped_epoch: int | None = None
        self._waited = 0
        self._restored = False

    def on_fit_begin(self, trainer: Any) -> None:
        """Stop at once if the training that was restored had been stopped."""
        if self.stopped_epoch is None:
            return
        if self._restored and self._waited >= self.patience:
            trainer.stop()
            return
        self.stopped_epoch = None
        if not self._restored:
            self._waited = 0

    def on_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Count the epochs without an improvement."""
        self._restored = False
        improved = self.improved(trainer, epoch, results)
        if improved is None:
            return
        self._waited = 0 if improved else self._waited + 1
        if self._waited >= self.patience:
            self.stopped_epoch = epoch
            trainer.stop()

    def state_dict(self) -> dict[str, Any]:
        """The best result so far and the epochs since."""
        own = {"waited": self._waited, "stopped_epoch": self.stopped_epoch}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        super().load_state_dict(state)
        if self.is_of(state):
            self._waited, self.stopped_epoch = state["waited"], state["stopped_epoch"]
            self._restored = True
