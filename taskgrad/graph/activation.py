"""What stands for a tensor between layers while a model's forward is followed on the driver."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten

from taskgrad.errors import TaskgradError


class CannotFollowError(TaskgradError):
    """A forward that cannot be followed; `module` is the name of the one that is at fault.

    If it is a layer that has to be cut further, `cut_further` is True.
    """

    def __init__(self, message: str, module: str, cut_further: bool = False) -> None:
        super().__init__(message)
        self.module = module
        self.cut_further = cut_further


class Follows(Protocol):
    """What activations belong to."""

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of torch on activations."""

    def read(self, activation: Activation) -> torch.Tensor:
        """The value of an activation."""

    def cannot(self, why: str) -> CannotFollowError:
        """The error for a forward that cannot be followed."""


class Activation(torch.Tensor):
    """A tensor between layers, while a forward is followed: its shape, and no values."""

    fake: torch.Tensor
    value: int
    following: Follows

    @staticmethod
    def of(fake: torch.Tensor, value: int, following: Follows) -> Activation:
        """One that looks like a fake tensor, and stands for a value of the graph."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Activation = make(
            Activation,
            fake.shape,
            strides=fake.stride(),
            storage_offset=fake.storage_offset(),
            dtype=fake.dtype,
            device=fake.device,
            requires_grad=fake.requires_grad,
        )
        made.fake, made.value, made.following = fake, value, following
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(t for t in tensors_in((args, kwargs or {})) if isinstance(t, Activation))
        return found.following.operation(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = next(t for t in tensors_in((args, kwargs or {})) if isinstance(t, Activation))
        raise found.following.cannot(f"{func} is called by other means than torch's functions")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        shape = list(self.fake.shape)
        return f"activation(shape={shape}, dtype={self.fake.dtype}, values on a worker)"

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else format(self.following.read(self), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return torch.clone(self)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, as torch sees it."""
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


_OURS = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_PYTHON = Path(contextlib.__file__).parent


def line_of_user() -> str:
    """The line of code that is running and is neither torch's nor ours, for a message."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inner = {_OURS, _TORCH} & set(path.parents) or path.parent == _PYTHON
        if not inner and path.exists():
            return f" ({path.name}, line {frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
