"""Let calls of ``torch.autograd.Function`` be followed, of which torch tells nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from taskgrad.graph.following import Following
from taskgrad.graph.stand_ins import follower

_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


class _Applied:
    """``apply`` of a class of torch.autograd.Function, as a function that can be sent."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)  # type: ignore[attr-defined]


@contextlib.contextmanager
def functions_followed() -> Iterator[None]:
    """Tell what follows a forward in this thread of each ``apply`` in the block."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        following = follower.get()
        if not isinstance(following, Following) or following.paused:
            return _apply(cls, *args, **kwargs)
        if issubclass(cls, CheckpointFunction):
            return args[0](*args[2:])
        if not following.concerns(args, kwargs):
            return _apply(cls, *args, **kwargs)
        return following.function(cls.__name__, _Applied(cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment]
