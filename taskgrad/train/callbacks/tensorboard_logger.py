"""Write steps and epochs for TensorBoard."""

from __future__ import annotations

import os
from typing import Any

from taskgrad.formats.weights import path_of
from taskgrad.train.callbacks.step_log import StepLog, columns
from taskgrad.train.loss import StepLoss


class TensorBoardLogger(StepLog):
    """Writes steps and epochs for TensorBoard; needs the extra ``taskgrad[tensorboard]``.

    For each step the scalars ``step/loss``, ``step/learning_rate/`` plus the name of each group of
    parameters, ``step/grad_norm`` with clipping, ``step/bubble`` and ``step/seconds``; for each
    epoch ``epoch/`` plus the name of each result. They are in the file when their step or epoch is
    done. A training that is restored goes on in the same curves: TensorBoard does not show what was
    written of steps that are not in the checkpoint, nor, if a training begins at step 0, anything
    older in the folder.

    Parameters
    ----------
    folder : path
        Where the files go, on the driver: ``tensorboard --logdir`` of this folder or one above it.

    Raises
    ------
    ImportError
        TensorBoard is not installed.

    Examples
    --------
    >>> import functools, tempfile, torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
    >>> run = tempfile.TemporaryDirectory()
    >>> logger = tg.TensorBoardLogger(run.name)
    >>> trainer = tg.Trainer(chain, torch.nn.functional.mse_loss, sgd, callbacks=[logger])
    >>> history = trainer.fit([(torch.ones(4, 2), torch.zeros(4, 1))], epochs=2, progress=False)
    >>> len(list(logger.folder.glob("events.out.tfevents.*")))
    1
    >>> run.cleanup()
    >>> client.close()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.folder = path_of(folder)
        _writer_class()  # now, and not after the first step
        self._writer: Any = None

    def open_at(self, step: int) -> None:
        """Write to a new file; TensorBoard forgets what the older ones have from this step on."""
        self._close()
        self._writer = _writer_class()(str(self.folder), purge_step=step)

    def log_step(self, trainer: Any, loss: StepLoss) -> None:
        """Write the numbers of a step."""
        self._write("step", columns(loss), loss.step)

    def log_epoch(self, trainer: Any, epoch: int, results: dict[str, float]) -> None:
        """Write the results of an epoch, at its last step."""
        self._write("epoch", results, trainer.steps - 1)

    def on_fit_end(self, trainer: Any, history: list[dict[str, float]]) -> None:
        """Close the file; a later step opens another."""
        self._close()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Close the file."""
        self._close()

    def _write(self, kind: str, values: Any, step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLogger needs TensorBoard: pip install 'taskgrad[tensorboard]'"
        ) from error
    return SummaryWriter
