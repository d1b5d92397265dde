"""Devices of a worker: copies to them, their memory, and errors that say that it is full."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from taskgrad.graph.memory_layout import is_dense
from taskgrad.graph.pack import is_plain
from taskgrad.graph.pytree import flatten

# Pinned memory comes in powers of two and is kept by torch: larger tensors are copied without it.
_MOST_PINNED = 256 << 20

_stay: ContextVar[bool] = ContextVar("taskgrad_results_stay", default=False)
_homes: dict[str, torch.device] = {}  # by type

# As torch's allocators, CUDA and its libraries say it, in a RuntimeError.
_FULL = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def assigned(device: str) -> torch.device:
    """The device of this name, with its index; RuntimeError if this worker cannot use it.

    A bare "cuda" is the first that this worker sees, as dask-cuda arranges it.
    """
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device!r} was asked for, and this worker sees no CUDA device")
    try:
        there = torch.empty(0, device=found).device
    except Exception as error:  # each kind of device has its own
        raise RuntimeError(
            f"device {device!r} was asked for, and this worker cannot use it: {error}"
        ) from error
    _homes[there.type] = there
    return there


def home(kind: str) -> torch.device:
    """The device of this type that layers were put on last in this process; else the current one.

    What arrives for them goes there at once: a worker of a host with eight GPUs would otherwise
    have a context on the first one too, and every value on its way there.
    """
    return _homes.get(kind, torch.device(kind))


def in_use() -> bool:
    """True if this process has used a device that is not the CPU, or may have."""
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return False
    module = torch.get_device_module(kind)
    used: bool = getattr(module, "is_initialized", module.is_available)()
    return used


def staged(x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """The tensor in pinned memory if `to_device` copies it faster from there, else as it is.

    A copy from pageable memory makes the thread wait until the device has done all it has to do.
    """
    if device is None or device.type != "cuda" or not (x.is_cpu and is_plain(x) and is_dense(x)):
        return x
    return x.pin_memory() if 0 < x.nbytes <= _MOST_PINNED and not x.is_pinned() else x


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, for kernels of this thread's stream; itself if it is there.

    The thread does not wait for a copy from pinned memory, nor does the copy wait for kernels that
    were launched before: it has a stream of its own, for which later kernels of the thread's stream
    wait. Torch reuses the pinned memory only when the copy is done: its allocator records an event.
    To the host every copy is waited for, since the host reads it without looking at a stream.
    """
    if device.type != "cuda":
        return x.to(device)
    if not (x.is_cpu and x.is_pinned()):
        return x.to(device, non_blocking=True)
    copies, kernels = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = x.to(device, non_blocking=True)
    kernels.wait_stream(copies)
    moved.record_stream(kernels)  # before these have run, its memory is not for other copies
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def results_stay() -> Iterator[None]:
    """In the block, what training steps compute stays on its device: no Dask task returns it."""
    before = _stay.set(True)
    try:
        yield
    finally:
        _stay.reset(before)


def do_results_stay() -> bool:
    """True in a block of `results_stay`."""
    return _stay.get()


def on_host(value: Any) -> Any:
    """The value with its tensors in the host's memory."""
    if not in_use():
        return value
    leaves, structure = flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if all(t.is_cpu or t.is_meta for t in tensors):
        return value
    return structure.build([x.cpu() if isinstance(x, torch.Tensor) else x for x in leaves])


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a device's memory that are in use, by any process, and that there are.

    What torch has freed and keeps for later counts as free. None for the CPU, and for devices that
    cannot say.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return total - free - kept, total


def advice(error: BaseException) -> str:
    """What helps if a device, or the host, has no memory left or CUDA has failed; else nothing."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    if any(full in text for full in _FULL):
        return (
            "There is no memory left for it. Smaller batches, more microbatches= with the schedule "
            '"1f1b", checkpoint= (layers run again in the backward), amp=, more workers or an '
            "optimizer that keeps less need less of it; chain.memory() says what is held now."
        )
    if "CUDA error" in text:
        return (
            "After this the worker's process cannot use CUDA any more, and the kernel that failed "
            "may be an earlier one: an index out of range, for example. Start the cluster again "
            "with CUDA_LAUNCH_BLOCKING=1 to see which, and go on from a checkpoint."
        )
    return ""
