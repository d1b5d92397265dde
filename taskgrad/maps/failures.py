"""An item's own exception: sent home as it is, and told which item it was and where.

Both maps raise what the user's function raised, with its own type, so that ``except ValueError``
works as round a loop. What a loop would show of itself, the item and the place, is in a note
(``error.__notes__``, shown under the traceback).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import cloudpickle

from taskgrad.errors import TravelError
from taskgrad.graph.layers import kind_of

E = TypeVar("E", bound=BaseException)

_LONGEST_TRACEBACK = 4000


def note_item(
    error: BaseException, index: int, fn: Callable[..., Any], worker: str, frames: str = ""
) -> None:
    """Say in an exception which item of which function raised it, and on which worker.

    To be called on the driver: there are exceptions that lose their notes when they are pickled.

    Parameters
    ----------
    error
        What the item raised.
    index
        The item's place in the input, from 0.
    fn
        The function that was mapped.
    worker
        The address of the worker that ran it, or another word for the place.
    frames
        What `own_frames` gave there.
    """
    error.add_note(f"This is item {index} of the map of {kind_of(fn)!r}, on worker {worker}.")
    if frames:
        error.add_note(f"Its traceback there:\n{frames}")


def own_frames(error: BaseException, ours: int = 1) -> str:
    """The frames of an exception's traceback as text, without this many of ours at its start."""
    frames = traceback.extract_tb(error.__traceback__)[ours:]
    return "".join(traceback.format_list(frames))[-_LONGEST_TRACEBACK:].rstrip()


def portable(error: E) -> E | TravelError:
    """The exception, if it can be pickled and made again; else a TravelError with its text."""
    try:
        again = cloudpickle.loads(cloudpickle.dumps(error))
        if type(again).__qualname__ == type(error).__qualname__:
            return error
        why = f"it is pickled as a {type(again).__name__}"
    except Exception as trouble:
        why = f"{type(trouble).__name__}: {trouble}"
    text = "".join(traceback.format_exception_only(error)).rstrip()
    return TravelError(
        f"an item raised an exception that cannot be sent to the driver ({why}). It was:\n{text}"
    )
