"""Exceptions of items of `map` and `imap`, with a note of the item and its worker.

What the user's function raised is raised with its own type, so that ``except ValueError`` works as
around a loop. The note (``error.__notes__``) is shown under the traceback. StopIteration, and what
is not an Exception, such as SystemExit, are instead the cause of a LayerError: an item must end
neither the driver nor an iteration over results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from taskgrad.errors import LayerError, TravelError
from taskgrad.graph.layers import kind_of
from taskgrad.remote_errors import is_portable, message_of, text_of
from taskgrad.worker_names import WorkerName


def item_error(
    error: BaseException, index: int, fn: Callable[..., Any], worker: WorkerName, frames: str = ""
) -> Exception:
    """The exception that a map of `fn` raises when the item at place `index` raised `error`.

    `worker` names the worker that ran it, or where else it ran; `frames` is its traceback there,
    from `own_frames`. To be called on the driver, as some exceptions lose their notes when they are
    pickled.
    """
    what = f"item {index} of the map of {kind_of(fn)!r}"
    ends_iteration = isinstance(error, StopIteration | StopAsyncIteration)
    if ends_iteration or not isinstance(error, Exception):
        ended = "an iteration over the results" if ends_iteration else "the worker, nor the driver"
        return LayerError(
            f"{what}, on worker {worker}, raised {type(error).__name__}: {message_of(error)}\nIt "
            f"does not end {ended}: it is an error of this call."
            + (f" Its traceback there:\n{frames}" if frames else ""),
            what,
            worker.address,
            error,
        )
    error.add_note(f"This is {what}, on worker {worker}.")
    if frames:
        error.add_note(f"Its traceback there:\n{frames}")
    return error


def is_ctrl_c(error: BaseException) -> bool:
    """True for the user's Ctrl-C, which is raised in the main thread and not by an item."""
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
    )


def portable(error: BaseException) -> BaseException:
    """The exception, if it can be pickled and unpickled; else a TravelError with its text.

    The exception is then the cause, without the parts that cannot be sent.
    """
    if is_portable(error):
        return error
    refused = TravelError(
        "an item raised an exception that cannot be sent to the driver as it is (it is large, or "
        f"cannot be pickled and made again). It was:\n{text_of(error)}"
    )
    refused.__cause__ = error
    return refused
