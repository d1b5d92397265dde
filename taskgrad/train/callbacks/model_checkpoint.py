"""Save the last and the best state of a training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from taskgrad.arguments import whole
from taskgrad.formats.weights import CHECKPOINT, path_of
from taskgrad.train.callbacks.monitor import Monitor
from taskgrad.train.loss import StepLoss


class ModelCheckpoint(Monitor):
    """Saves a training after each epoch, and apart from that the best epoch so far.

    The checkpoints are in ``folder/"last"`` and ``folder/"best"``, each replaced by the next one:
    `Trainer.restore` goes on from them, and `load_state_dict` and ``GraphChain(weights=)`` read
    their weights. The trainer calls this callback after all others, so that a checkpoint has what
    they noted of the same step or epoch, the averages of `EMA` too.

    Parameters
    ----------
    folder : path
        On a filesystem that the driver and all workers share.
    monitor : str, optional
        The name of a result as in the history of `Trainer.fit`; by default ``val_loss`` if there is
        a `val_loader`, else ``loss``.
    mode : {"min", "max"}
        Which results are better: smaller or larger ones. One that is not a number is never best.
    every : int, optional
        Save ``"last"`` also after this many steps, and again after as many; these steps are done
        before the next one begins.

    Attributes
    ----------
    best, best_epoch : float or None, int or None
        The best result so far and its epoch.
    best_path, last_path : Path or None
        The folders of the checkpoints; None before there is one.

    Raises
    ------
    ValueError
        When `Trainer.fit` begins: another callback of this kind has this folder. After an epoch:
        the results have none of this name; the message lists what there is.
    CheckpointError
        As `Trainer.save`.

    Examples
    --------
    >>> import functools, tempfile, torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
    >>> run = tempfile.TemporaryDirectory()
    >>> kept = tg.ModelCheckpoint(run.name)
    >>> chain = tg.GraphChain(model)
    >>> trainer = tg.Trainer(chain, torch.nn.functional.mse_loss, sgd, callbacks=[kept])
    >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> history = trainer.fit(batches, epochs=3, val_loader=batches, progress=False)
    >>> kept.best == min(epoch["val_loss"] for epoch in history)
    True
    >>> best = tg.load_state_dict(kept.best_path)
    >>> sorted(best)
    ['0.bias', '0.weight', '1.bias', '1.weight']
    >>> run.cleanup()
    >>> client.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every: int | None = None,
    ) -> None:
        super().__init__(monitor, mode)
        self.folder = path_of(folder)
        self.every = None if every is None else whole("every", every, least=1)
        self.best_path: Path | None = None
        self.last_path: Path | None = None

    def on_fit_begin(self, trainer: Any) -> None:
        """Refuse a folder that another callback of this kind saves to."""
        if any(other.folder == self.folder for other in self._savers(trainer) if other is not self):
            raise ValueError(
                f"two ModelCheckpoint callbacks save to {self.folder}: give each its own folder"
            )

    def reads_state(self, step: int) -> bool:
        """True for the steps after which this callback saves."""
        return self.every is not None and (step + 1) % self.every == 0

    def on_step(self, trainer: Any, loss: StepLoss) -> None:
        """Save the last state after every n-th step."""
        if self.reads_state(loss.step):
            self._save_last(trainer)

    def on_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Save the last state, and the best one if this is it."""
        savers = self._savers(trainer)
        if self is not savers[-1]:
            return  # that one saves for all, so that each checkpoint has the state of all
        for saver in [saver for saver in savers if saver.improved(trainer, epoch, results)]:
            saver.best_path = saver.folder / "best"
            trainer.save(saver.best_path)
        # Now, and not before: what is in "last" tells the truth about "best" whenever this ends.
        for saver in savers:
            saver._save_last(trainer)

    def _savers(self, trainer: Any) -> list[ModelCheckpoint]:
        return [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]

    def _save_last(self, trainer: Any) -> None:
        self.last_path = self.folder / "last"
        trainer.save(self.last_path)

    def state_dict(self) -> dict[str, Any]:
        """The best result so far, and where it is saved."""
        where = None if self.best_path is None else str(self.best_path)
        return super().state_dict() | {"best_path": where}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the best result so far."""
        super().load_state_dict(state)
        if self.best is not None:
            here = self.folder / "best"  # the folder may have been moved
            self.best_path = here if (here / CHECKPOINT).exists() else Path(state["best_path"])
