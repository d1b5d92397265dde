"""Worker: what becomes of our messages that still come when the plugin is gone.

A worker that closes accepts messages for some time after its plugins have been torn down. Dask logs
an error for each one without a handler.
"""

from __future__ import annotations

from typing import Any

from distributed import Worker
from distributed.comm.core import Comm
from distributed.core import Status


async def hang_up(comm: Comm, **message: Any) -> Status:
    """A handler that ends the connection: to the caller, the worker is gone."""
    comm.abort()
    return Status.dont_reply


def stop_answering(worker: Worker, *names: str) -> None:
    """Hang up on who calls these handlers from now on."""
    for name in names:
        worker.handlers[name] = hang_up


def stop_listening(worker: Worker, *names: str) -> None:
    """Ignore these messages of the scheduler from now on."""
    for name in names:
        worker.stream_handlers[name] = lambda **message: None
