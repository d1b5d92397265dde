"""Offload optimizer state, and the copies that undo a step, from memory to memory-mapped files.

For a shard whose worker has no memory for them. An optimizer reads and writes its state once a
step, one parameter after the other, and forwards and backwards do not need it. So after the step of
each parameter the memory pages of its state are freed; the system still caches as much of the files
as it has memory for. The bits are the same.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from taskgrad.errors import TaskgradError
from taskgrad.worker.undo import Copies

Key = TypeVar("Key")

# Tensors of fewer bytes stay in memory.
_LEAST = 1 << 20
# So many bytes of parameters take their step at once.
CHUNK = 64 << 20


class SpilledState:
    """The state of one optimizer in files without a name, which the system deletes with the worker.

    Averages of its parameters can be there, too.

    For optimizers that treat each parameter by itself, as all of torch's own do.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._maps: dict[int, mmap.mmap] = {}  # by the address of the tensor over it

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step of the optimizer, some parameters at a time, and drop their gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in parameters if p.grad is not None}
        for parameter in grads:
            parameter.grad = None
        for chunk in in_rows({p: p.nbytes for p in grads}, CHUNK):
            for parameter in chunk:
                parameter.grad = grads.pop(parameter)
            optimizer.step()
            for parameter in chunk:
                parameter.grad = None
                self.put_away(optimizer.state[parameter])

    def put_away(self, state: dict[str, Any]) -> None:
        """Move one parameter's state from memory to files."""
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.nbytes < _LEAST:
                continue
            if not self.holds(value):
                value, memory = _in_file(self._folder, value)
                state[key], self._maps[value.data_ptr()] = value, memory
            # Written to the file by the system, when it needs the memory.
            self.free_pages_of(value)

    def leave_memory(self) -> None:
        """Free the memory pages of all files."""
        for memory in self._maps.values():
            memory.madvise(mmap.MADV_DONTNEED)

    def free_pages_of(self, value: torch.Tensor) -> None:
        """Free the memory pages of one tensor, if it lies in a file."""
        if self.holds(value):
            self._maps[value.data_ptr()].madvise(mmap.MADV_DONTNEED)

    def holds(self, value: torch.Tensor) -> bool:
        """True if this tensor lies in a file."""
        return value.data_ptr() in self._maps

    def forget_all_but(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Close the files whose tensors are not in this state."""
        tensors = [v for of in state.values() for v in of.values() if isinstance(v, torch.Tensor)]
        kept = {t.data_ptr() for t in tensors}
        self._maps = {address: m for address, m in self._maps.items() if address in kept}


class CopiesInFiles(Copies):
    """Copies tensors to files; each new copy of a tensor overwrites the one before.

    `state` has the tensors that are in files themselves, if any are.
    """

    def __init__(self, folder: str, state: SpilledState | None) -> None:
        self._folder = folder
        self._state = state
        self._known: dict[tuple[Any, ...], tuple[torch.Tensor, mmap.mmap]] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, valid until the next one of this tensor is made."""
        if tensor.layout is not torch.strided or tensor.nbytes < _LEAST:
            return tensor.clone()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._known:
            self._known[key] = _in_file(self._folder, tensor)
        copy, memory = self._known[key]
        copy.copy_(tensor)
        memory.madvise(mmap.MADV_DONTNEED)
        if self._state is not None:
            self._state.free_pages_of(tensor)
        return copy


def _in_file(folder: str, value: torch.Tensor) -> tuple[torch.Tensor, mmap.mmap]:
    """A copy of a tensor that lies in a file of its own, which has no name."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(value.nbytes)
            if hasattr(os, "posix_fallocate"):
                # Takes the room now: a write into a mapped file on a full disk kills the process.
                os.posix_fallocate(file.fileno(), 0, value.nbytes)
            memory = mmap.mmap(file.fileno(), value.nbytes)
    except OSError as error:
        raise TaskgradError(
            f"the optimizer's state, its undo or an average needs {value.nbytes} bytes for a file "
            f"in {folder}: {error.strerror}. Make room there, or start the worker with another "
            "--local-directory"
        ) from error
    flat = torch.frombuffer(memory, dtype=value.dtype)
    found = flat.as_strided(value.shape, torch.empty_like(value, device="meta").stride())
    found.copy_(value)
    return found, memory


def in_rows(sizes: Mapping[Key, int], most: int) -> Iterator[list[Key]]:
    """The keys in order, in lists of at most `most` bytes together, or of one key.

    Examples
    --------
    >>> list(in_rows({"a": 2, "b": 3, "c": 9}, 6))
    [['a', 'b'], ['c']]
    """
    row: list[Key] = []
    total = 0
    for key, size in sizes.items():
        if row and total + size > most:
            yield row
            row, total = [], 0
        row.append(key)
        total += size
    if row:
        yield row
