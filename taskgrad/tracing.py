"""Record the calls that a Python function makes, in place of making them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from taskgrad.errors import TaskgradError


class Tracer(Protocol):
    """What `tg.spawn` and chains call within `traced_by`; it returns thunks of what it records."""

    def call(self, layout: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A chain was called that has this layout."""

    def spawn(
        self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], worker: Any
    ) -> Any:
        """A function or module was given to `tg.spawn`."""


_tracer: ContextVar[Tracer | None] = ContextVar("taskgrad_tracer", default=None)
current_tracer = _tracer.get
"""The innermost `traced_by`'s tracer; None outside of one."""


@contextlib.contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    """Pass the calls that are made in the block to a tracer."""
    token = _tracer.set(tracer)
    try:
        yield
    finally:
        _tracer.reset(token)


def refuse_reading() -> None:
    """Raise TaskgradError where calls are recorded only: there are no values yet."""
    if _tracer.get() is not None:
        raise TaskgradError(
            "a value is read in a function that a Trainer trains. The function only says which "
            "calls a batch passes, before any of them runs: use functions of the thunk, "
            "tg.spawn(fn, thunk)"
        )


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore torch's random state after a block, in which a function may draw."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
