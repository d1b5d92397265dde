"""What went wrong in a layer, as an error that says where."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from taskgrad.errors import LayerError
from taskgrad.graph.nodes import Draw
from taskgrad.graph.pytree import describe

# Dask cuts long messages in its own way.
_LONGEST_TRACEBACK = 4000


def forward_error(
    error: Exception,
    address: str,
    name: str,
    kind: str,
    given: tuple[Any, Any],
    draw: Draw | None,
) -> LayerError:
    """A layer raised in its forward."""
    args, kwargs = given
    shown = ", ".join([*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items())])
    return LayerError(
        f"layer {name!r} ({kind}) on worker {address} raised {type(error).__name__}{_when(draw)}: "
        f"{error}\nIt was given {shown}. Check the layer before it, or the input.\n"
        f"The layer's own traceback:\n{_own_frames(error)}{type(error).__name__}: {error}",
        name,
        address,
        error,
    )


def backward_error(error: Exception, address: str, title: str, draw: Draw | None) -> LayerError:
    """Autograd raised in the backward of some layers."""
    return LayerError(
        f"the backward of {title!r} on worker {address} raised {type(error).__name__}{_when(draw)}"
        f": {error}\n{_advice(error)}\n"
        f"The traceback there:\n{_own_frames(error)}{type(error).__name__}: {error}",
        title,
        address,
        error,
    )


@contextmanager
def update_errors(address: str, step: int | None, part: str, hint: str = "") -> Iterator[None]:
    """What a part of an optimizer's step raises, as an error that says where."""
    try:
        yield
    except Exception as error:
        when = "" if step is None else f" in step {step}"
        raise LayerError(
            f"{part} on worker {address} raised {type(error).__name__}{when}: {error}.{hint}\n"
            "The update is not made on any worker: parameters and optimizers are as they were "
            f"before it.\nThe traceback there:\n{_own_frames(error)}{type(error).__name__}: "
            f"{error}",
            part.removeprefix("the "),
            address,
            error,
        ) from error


@contextmanager
def making_errors(address: str) -> Iterator[None]:
    """What the making of an optimizer or a scheduler raises, as an error that says where."""
    try:
        yield
    except Exception as error:
        raise LayerError(
            f"the optimizer or lr_scheduler could not be made on worker {address}: "
            f"{type(error).__name__}: {error}\nNothing was changed on any worker.\n"
            f"The traceback there:\n{_own_frames(error)}{type(error).__name__}: {error}",
            "optimizer",
            address,
            error,
        ) from error


def _advice(error: Exception) -> str:
    if "use_reentrant=True" in str(error):
        return (
            "The layer uses torch.utils.checkpoint with use_reentrant=True, which works in one "
            "process only: use use_reentrant=False, or the checkpoint= of a Trainer."
        )
    return "A function of the layer's own, or a tensor that it wrote in place?"


def _when(draw: Draw | None) -> str:
    return "" if draw is None else f" in microbatch {draw.microbatch} of step {draw.step}"


def _own_frames(error: Exception) -> str:
    """The frames below ours: the layer's own."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return "".join(traceback.format_list(frames))[-_LONGEST_TRACEBACK:]
