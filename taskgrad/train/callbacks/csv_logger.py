"""Write steps and epochs to CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taskgrad.formats.weights import path_of
from taskgrad.train.callbacks.step_log import StepLog, columns
from taskgrad.train.loss import StepLoss


class CSVLogger(StepLog):
    """Writes a row for each step and for each epoch to CSV files.

    ``steps.csv`` has the columns ``step``, ``epoch``, ``loss``, ``learning_rate/`` plus the name of
    each group of parameters (its pattern in `param_groups`, or ``default``), ``grad_norm`` (empty
    without clipping), ``bubble`` and ``seconds``; ``epochs.csv`` has ``epoch``, ``step`` (how many
    were taken) and the results, as the history of `Trainer.fit`. Numbers are written so that they
    can be read to the bit, and each row is written when its step or epoch is done. An epoch that
    `Trainer.stop` ended before its end has no row.

    A training that is restored goes on in the files: the rows of steps and epochs that are not in
    the checkpoint are removed. One that begins at step 0 replaces the files.

    Parameters
    ----------
    folder : path
        Where the files go, on the driver.

    Examples
    --------
    >>> import csv, functools, tempfile, torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
    >>> run = tempfile.TemporaryDirectory()
    >>> logger = tg.CSVLogger(run.name)
    >>> trainer = tg.Trainer(chain, torch.nn.functional.mse_loss, sgd, callbacks=[logger])
    >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> history = trainer.fit(batches, epochs=2, progress=False)
    >>> print((logger.folder / "steps.csv").read_text().splitlines()[0])
    step,epoch,loss,learning_rate/default,grad_norm,bubble,seconds
    >>> with open(logger.folder / "epochs.csv") as file:
    ...     [float(row["loss"]) for row in csv.DictReader(file)] == [e["loss"] for e in history]
    True
    >>> run.cleanup()
    >>> client.close()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.folder = path_of(folder)
        self._steps = _Table(self.folder / "steps.csv")
        self._epochs = _Table(self.folder / "epochs.csv")
        self._restored: int | None = None  # rows of epochs that the checkpoint has

    def open_at(self, step: int) -> None:
        """Remove the rows of steps from this one on, and of epochs that end later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        most, self._restored = self._restored, None
        self._steps.keep(lambda number, row: int(row["step"]) < step)
        self._epochs.keep(
            lambda number, row: int(row["step"]) <= step if most is None else number < most
        )

    def log_step(self, trainer: Any, loss: StepLoss) -> None:
        """Write the row of a step."""
        self._steps.append({"step": loss.step, "epoch": trainer.epoch, **columns(loss)})

    def log_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Write the row of an epoch."""
        self._epochs.append({"epoch": epoch, "step": trainer.steps, **results})

    def state_dict(self) -> dict[str, Any]:
        """How many rows of epochs there are."""
        return {"epochs": self._epochs.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the rows that the checkpoint has."""
        super().load_state_dict(state)
        self._restored = state["epochs"]


class _Table:
    """A CSV file to which rows are added; a row may bring new columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._columns: list[str] = []

    def keep(self, wanted: Callable[[int, Mapping[str, str]], bool]) -> None:
        """Remove all rows but those that are wanted, by their number and what they hold."""
        self._rewrite([], wanted)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row to the end; it is in the file when this returns."""
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite(new, lambda number, row: True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self.rows += 1

    def _rewrite(self, new: list[str], wanted: Callable[[int, Mapping[str, str]], bool]) -> None:
        kept: list[dict[str, str]] = []
        names: list[str] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                names = list(reader.fieldnames or ())
                whole = (row for row in reader if None not in row.values())  # not cut off
                kept = [row for number, row in enumerate(whole) if wanted(number, row)]
        self._columns, self.rows = [*(names if kept else []), *new], len(kept)
        if not self._columns:
            self.path.unlink(missing_ok=True)
            return
        aside = self.path.with_suffix(".new")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(aside, self.path)
