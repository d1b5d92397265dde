"""The exceptions that taskgrad raises; every message says what was wrong, where, and what to do."""

from __future__ import annotations

from typing import Any


class TaskgradError(Exception):
    """Base of every error that taskgrad itself raises."""


class PlacementError(TaskgradError, ValueError):
    """A placement names a worker that is not there, or has the wrong length."""


class CotangentError(TaskgradError, ValueError):
    """A cotangent does not match the output that it belongs to."""


class TapeError(TaskgradError, RuntimeError):
    """A backward asked for a tape that was never written or is already used."""


class ClusterMismatchError(TaskgradError, RuntimeError):
    """Client, scheduler and workers do not run the same software."""


class WorkerLostError(TaskgradError, RuntimeError):
    """A worker that holds layers or tapes is gone."""


class MemoryLimitError(TaskgradError, MemoryError):
    """What is asked for is more than the memory of a worker."""


class CheckpointError(TaskgradError, ValueError):
    """A checkpoint, or a file of weights, cannot be written or read, or is another model's."""


class TravelError(TaskgradError, TypeError):
    """A value cannot be sent to another process, and so cannot be a task's result.

    It is a serialization error; the name stays because programs catch it.
    """


class DerivativeError(TaskgradError, NotImplementedError):
    """A vectorized function has a part without a derivative; the message names the part."""


class CollectiveError(TaskgradError, RuntimeError):
    """The ranks of a `pmap` did not meet in a collective: they called different ones, or waited
    too long for one."""


class LayerError(TaskgradError, RuntimeError):
    """A layer raised on its worker; ``__cause__`` is the layer's own exception.

    Attributes
    ----------
    layer, worker : str
        The layer's name in the model, and the address of the worker that ran it.
    """

    def __init__(self, message: str, layer: str, worker: str, cause: BaseException | None) -> None:
        super().__init__(message)
        self.layer = layer
        self.worker = worker
        self.__cause__ = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.layer, self.worker, self.__cause__)
