"""Undo what user code did to objects and tensors, from copies of their contents.

An optimizer writes parameters and its state in place, adds state at its first step, replaces
options of its groups; a scheduler writes those options too. Which of them it will write is not
known beforehand, so all that can be reached from the optimizer and the scheduler is copied.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from taskgrad.graph.objects import slots_of

# Instances of classes from these modules are shared with other code: loggers, locks, connections.
_SHARED = frozenset({*sys.stdlib_module_names, "dask", "distributed", "tornado"})
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the tensor's device; on the host if the device has no memory for it."""
    try:
        return tensor.detach().clone()
    except torch.OutOfMemoryError:
        return tensor.detach().to("cpu", copy=True)


def of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """True if this is one of torch's own optimizers, without hooks.

    Those write no gradients, and no parameter that has none.
    """
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer).__module__.startswith("torch.optim.") and not hooks


def untouched_by(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """The parameters of an optimizer that its next step will not write."""
    if optimizer is None or not of_torch(optimizer):
        return []
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]


class Undo:
    """The contents of objects, and of all that they hold, at the time when this is made.

    Tensors and arrays are copied; for dictionaries, lists, sets and instances the items are
    recorded. `restore` puts contents back in place: the objects stay the same ones.

    All that can be reached from `roots` is recorded, but not what functions, classes, modules, and
    instances of classes of the standard library hold. `copy` copies tensors; those in `without`
    will not be changed and need no copy. `gradients` says what is recorded of parameters'
    ``.grad``: nothing, which tensor it is, or its values too.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        copy: Callable[[torch.Tensor], torch.Tensor] = copied,
        without: Iterable[torch.Tensor] = (),
        gradients: Literal["no", "which", "values"] = "no",
    ) -> None:
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._restores: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._copy = copy
        self._gradients = gradients
        self._seen: dict[int, Any] = {
            id(t): t for t in without
        }  # references, so that no id is reused
        stack = list(roots)
        while stack:
            value = stack.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                stack.extend(self._record(value))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for restore, arguments in self._restores:
                restore(*arguments)
            for tensor, memory, copy in self._tensors:
                if memory.layout is not torch.strided:
                    tensor.data = copy
                    continue
                memory.copy_(copy)
                if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                    tensor.data = memory

    def _record(self, value: Any) -> Iterator[Any]:
        """Record the contents of one object; yields what it holds."""
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.detach(), self._copy(value)))
            if value.__dict__:
                yield value.__dict__
            if self._gradients != "no" and value.is_leaf and value.requires_grad:
                self._restores.append((setattr, (value, "grad", value.grad)))
                if self._gradients == "values":
                    yield value.grad
        elif isinstance(value, dict):
            self._restores.append((_refill, (value, dict(value))))
            yield from value.keys()
            yield from value.values()
        elif isinstance(value, list | deque | set):
            self._restores.append((_refill, (value, list(value))))
            yield from value
        elif isinstance(value, tuple | frozenset):
            yield from value
        elif isinstance(value, np.ndarray):
            self._restores.append((np.copyto, (value, value.copy())))
        elif isinstance(value, torch.Generator):
            self._restores.append((value.set_state, (value.get_state(),)))
        elif value is not None and not isinstance(value, _OPAQUE):
            yield from self._record_instance(value)

    def _record_instance(self, value: Any) -> Iterator[Any]:
        if type(value).__module__.partition(".")[0] in _SHARED:
            return
        for name, held in slots_of(value).items():
            self._restores.append((object.__setattr__, (value, name, held)))
            yield held
        if hasattr(value, "__dict__"):
            yield value.__dict__


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(contents)
