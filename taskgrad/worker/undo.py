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


# Immutable, and they hold nothing.
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

Copied = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A tensor, a view of the memory that it had when it was copied, and the copy."""


class Copies:
    """Copies tensors on their devices; to the host if a device has no memory for a copy."""

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Copied]:
        """Copies of these tensors."""
        return [(t, t.detach(), self.copy(t.detach())) for t in tensors]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of one tensor, which has no part in autograd."""
        try:
            return tensor.clone()
        except torch.OutOfMemoryError:
            return tensor.to("cpu", copy=True)

    def take_back(self, copies: list[Copied]) -> None:
        """These copies are needed no more."""


class ReusedCopies(Copies):
    """Copies that are made again and again of the same tensors, into the same memory.

    The memory of copies that are needed no more is kept for the next ones: a step then takes no
    memory for them, and one call copies them all. At any time that is as much memory as the copies
    took that were needed at once: one set of them, or two where copies are made before those of the
    step before are given back.
    """

    def __init__(self) -> None:
        self._sets: list[list[Copied]] = []

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Copied]:
        """Copies of these tensors."""
        kept = {id(c[0]): c for c in self._sets.pop()} if self._sets else {}
        found: list[Copied] = []
        missing: list[torch.Tensor] = []
        for tensor in tensors:
            known = kept.get(id(tensor))
            if known is not None and _is_at(tensor, known[1]):
                found.append(known)
            else:
                missing.append(tensor)
        if found:
            torch._foreach_copy_([c[2] for c in found], [c[1] for c in found])
        return found + super().of(missing)

    def take_back(self, copies: list[Copied]) -> None:
        """Keep the memory of these copies for the next ones."""
        self._sets.append([c for c in copies if c[1].layout is torch.strided])


def _is_at(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    """True if a tensor is where it was when `memory` was a view of it."""
    alike = tensor.layout is torch.strided and tensor.dtype is memory.dtype
    return alike and tensor.device == memory.device and tensor.is_set_to(memory)


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
    instances of classes of the standard library hold. `copies` copies tensors; those in `without`
    will not be changed and need no copy. `gradients` says what is recorded of parameters'
    ``.grad``: nothing, which tensor it is, or its values too.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        copies: Copies | None = None,
        without: Iterable[torch.Tensor] = (),
        gradients: Literal["no", "which", "values"] = "no",
    ) -> None:
        self._restores: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._copies = copies or Copies()
        self._gradients = gradients
        seen: dict[int, Any] = {id(t): t for t in without}  # references, so that no id is reused
        tensors: list[torch.Tensor] = []
        stack = list(roots)
        while stack:
            value = stack.pop()
            if type(value) in _ATOMS or id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                self._record_tensor(value, stack)
            elif isinstance(value, dict):
                self._restores.append((_refill, (value, dict(value))))
                stack.extend(value.keys())
                stack.extend(value.values())
            else:
                stack.extend(self._record(value))
        self._tensors = self._copies.of(tensors)

    def release(self) -> None:
        """Give the copies back: nothing is to be restored."""
        self._copies.take_back(self._tensors)
        self._tensors = []

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

    def _record_tensor(self, value: torch.Tensor, stack: list[Any]) -> None:
        if value.__dict__:
            stack.append(value.__dict__)
        if self._gradients != "no" and value.is_leaf and value.requires_grad:
            self._restores.append((setattr, (value, "grad", value.grad)))
            if self._gradients == "values":
                stack.append(value.grad)

    def _record(self, value: Any) -> Iterator[Any]:
        """Record the contents of an object that is no tensor or dictionary; yields its parts."""
        if isinstance(value, list | deque | set):
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
