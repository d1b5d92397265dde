"""Errors of the user's code on a worker, as a LayerError that says what raised, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from taskgrad.errors import LayerError
from taskgrad.graph.calls import Draw
from taskgrad.graph.pytree import describe
from taskgrad.remote_errors import message_of, own_frames, shorten
from taskgrad.worker import devices
from taskgrad.worker_names import WorkerName

NOTHING_LOADED = "\nNothing was loaded on any worker."


def forward_error(
    error: BaseException,
    worker: WorkerName,
    name: str,
    kind: str,
    given: tuple[Any, Any],
    draw: Draw | None,
) -> LayerError:
    """A layer raised in its forward."""
    args, kwargs = given
    advice = devices.advice(error) or "Check the layer before it, or the input."
    shown = ", ".join([*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items())])
    return LayerError(
        f"layer {shorten(name)!r} ({kind}) on worker {worker} raised {_kind(error)}{_when(draw)}: "
        f"{message_of(error)}\nIt was given {shorten(shown)}. {advice}\n"
        f"The layer's own traceback:\n{_ending(error)}",
        name,
        worker.address,
        error,
    )


def backward_error(
    error: BaseException, worker: WorkerName, title: str, draw: Draw | None
) -> LayerError:
    """Autograd raised in the backward of some layers."""
    return LayerError(
        f"the backward of {shorten(title)!r} on worker {worker} raised {_kind(error)}{_when(draw)}"
        f": {message_of(error)}\n{_advice(error)}\nThe traceback there:\n{_ending(error)}",
        title,
        worker.address,
        error,
    )


@contextmanager
def layer_errors(
    what: str,
    name: str,
    worker: WorkerName,
    after: str = "",
    catch: type[BaseException] = Exception,
) -> Iterator[None]:
    """Raise what the block raises as a LayerError that says what raised it, and where."""
    try:
        yield
    except catch as error:
        raise LayerError(
            f"{what} on worker {worker} raised {_kind(error)}: {message_of(error)}{after}",
            name,
            worker.address,
            error,
        ) from error


@contextmanager
def receive_errors(value: object, step: int, worker: WorkerName) -> Iterator[None]:
    """Raise what keeps a worker from reading another one's value as a LayerError that says where.

    Not an OSError: the other worker is gone, or has stopped.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        hint = devices.advice(error) or "Can it be pickled there and read here?"
        about = re.fullmatch(r"[A-Z]+(\d+)\.(\d+)", str(value))
        where = f" (stage {about[1]}, microbatch {about[2]})" if about else ""
        raise LayerError(
            f"worker {worker} could not read what {value}{where} of step {step} sent it from "
            f"another worker: {_kind(error)}: {message_of(error)}\n{hint}\n"
            f"The traceback there:\n{_ending(error)}",
            str(value),
            worker.address,
            error,
        ) from error


@contextmanager
def update_errors(
    worker: WorkerName, step: int | None, part: str, hint: str = ""
) -> Iterator[None]:
    """Raise what a part of an optimizer's step raises as a LayerError that says where."""
    try:
        yield
    except BaseException as error:
        when = "" if step is None else f" in step {step}"
        hint += f" {devices.advice(error)}".rstrip()
        raise LayerError(
            f"{part} on worker {worker} raised {_kind(error)}{when}: {message_of(error)}.{hint}\n"
            "The update is not made on any worker: parameters and optimizers are as they were "
            f"before it.\nThe traceback there:\n{_ending(error)}",
            part.removeprefix("the "),
            worker.address,
            error,
        ) from error


@contextmanager
def making_errors(worker: WorkerName) -> Iterator[None]:
    """Raise what the making of an optimizer or a scheduler raises as a LayerError."""
    try:
        yield
    except BaseException as error:
        raise LayerError(
            f"the optimizer or lr_scheduler could not be made on worker {worker}: "
            f"{_kind(error)}: {message_of(error)}\nNothing was changed on any worker.\n"
            f"The traceback there:\n{_ending(error)}",
            "optimizer",
            worker.address,
            error,
        ) from error


def _advice(error: BaseException) -> str:
    if found := devices.advice(error):
        return found
    if "use_reentrant=True" in message_of(error):
        return (
            "The layer uses torch.utils.checkpoint with use_reentrant=True, which works in one "
            "process only: use use_reentrant=False, or the checkpoint= of a Trainer."
        )
    return "A function of the layer's own, or a tensor that it wrote in place?"


def exit_error(error: BaseException, worker: WorkerName, what: str) -> LayerError:
    """The user's code raised something that is no Exception, such as SystemExit."""
    return LayerError(
        f"{shorten(what)} on worker {worker} raised {_kind(error)}: {message_of(error)}\nIt does "
        "not end the worker, nor the driver: it is an error of this call. The traceback there:\n"
        f"{_ending(error)}",
        what,
        worker.address,
        error,
    )


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _when(draw: Draw | None) -> str:
    return "" if draw is None else f" in {draw}"


def _ending(error: BaseException) -> str:
    """The end of a traceback: the frames below ours, and the error."""
    return f"{own_frames(error)}\n{_kind(error)}: {message_of(error)}"
