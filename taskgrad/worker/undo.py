"""Take back what user code did to objects and tensors: their contents from before, kept aside.

An optimizer writes parameters and its state in place, adds state at its first step, replaces
options of its groups; a scheduler writes those options too. Of all this nothing is known beforehand
but where it is: in what can be reached from the optimizer and the scheduler.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch

# Instances of classes from these are shared with others: loggers, locks, connections.
_SHARED = frozenset({*sys.stdlib_module_names, "dask", "distributed", "tornado"})
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the tensor is; on the host if the device has no room for it."""
    try:
        return tensor.detach().clone()
    except torch.OutOfMemoryError:
        return tensor.detach().to("cpu", copy=True)


def of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is one of torch's own, which write no gradients, nor what has none."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer).__module__.startswith("torch.optim.") and not hooks


def untouched_by(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """The parameters of an optimizer that its next step will not write."""
    if optimizer is None or not of_torch(optimizer):
        return []
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]


class Undo:
    """The contents of objects, and of all that they hold, from when this was made.

    Tensors and arrays are copied; of dictionaries, lists, sets and instances it is noted what they
    hold. `restore` puts it back, every object staying the one that it was.

    Parameters
    ----------
    roots
        What to start from. Functions, classes and modules, and instances of classes of the standard
        library, are not looked into.
    copy
        Makes the copies of tensors.
    without
        Tensors that nobody will change.
    gradients
        What to keep of parameters' ``.grad``: nothing, which tensor it is, or its values too.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        copy: Callable[[torch.Tensor], torch.Tensor] = copied,
        without: Iterable[torch.Tensor] = (),
        gradients: Literal["no", "which", "values"] = "no",
    ) -> None:
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._puts: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._copy = copy
        self._gradients = gradients
        self._seen: dict[int, Any] = {id(t): t for t in without}  # held, so that no id comes again
        stack = list(roots)
        while stack:
            value = stack.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                stack.extend(self._note(value))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for put, arguments in self._puts:
                put(*arguments)
            for tensor, memory, copy in self._tensors:
                if memory.layout is not torch.strided:
                    tensor.data = copy
                    continue
                memory.copy_(copy)
                if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                    tensor.data = memory

    def _note(self, value: Any) -> Iterator[Any]:
        """Keep the contents of one object; gives what it holds."""
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.detach(), self._copy(value)))
            if value.__dict__:
                yield value.__dict__
            if self._gradients != "no" and value.is_leaf and value.requires_grad:
                self._puts.append((setattr, (value, "grad", value.grad)))
                if self._gradients == "values":
                    yield value.grad
        elif isinstance(value, dict):
            self._puts.append((_refill, (value, dict(value))))
            yield from value.keys()
            yield from value.values()
        elif isinstance(value, list | deque):
            self._puts.append((_refill_list, (value, list(value))))
            yield from value
        elif isinstance(value, set):
            self._puts.append((_refill, (value, set(value))))
            yield from value
        elif isinstance(value, tuple | frozenset):
            yield from value
        elif isinstance(value, np.ndarray):
            self._puts.append((np.copyto, (value, value.copy())))
        elif isinstance(value, torch.Generator):
            self._puts.append((value.set_state, (value.get_state(),)))
        elif value is not None and not isinstance(value, _OPAQUE):
            yield from self._note_instance(value)

    def _note_instance(self, value: Any) -> Iterator[Any]:
        if type(value).__module__.partition(".")[0] in _SHARED:
            return
        slots = [
            (name, getattr(value, name))
            for kind in type(value).__mro__
            for name in _names(kind.__dict__.get("__slots__", ()))
            if name not in ("__dict__", "__weakref__") and hasattr(value, name)
        ]
        for name, held in slots:
            self._puts.append((object.__setattr__, (value, name, held)))
            yield held
        if hasattr(value, "__dict__"):
            yield value.__dict__


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.update(contents)


def _refill_list(container: Any, contents: list[Any]) -> None:
    container.clear()
    container.extend(contents)
