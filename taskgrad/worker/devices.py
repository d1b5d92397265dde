"""Devices of a worker: copies to them, their memory, and errors that say that it is full."""

from __future__ import annotations

import torch

from taskgrad.graph.memory_layout import is_dense
from taskgrad.graph.pack import is_plain

# Pinned memory comes in powers of two and is kept by torch: larger tensors are copied without it.
_MOST_PINNED = 256 << 20

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
        return torch.empty(0, device=found).device
    except Exception as error:  # each kind of device has its own
        raise RuntimeError(
            f"device {device!r} was asked for, and this worker cannot use it: {error}"
        ) from error


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

    The thread does not wait for a copy from pinned memory. Torch reuses that memory only when the
    copy is done: its allocator records an event. To the host every copy is waited for, since the
    host reads it without looking at a stream.
    """
    return x.to(device, non_blocking=device.type == "cuda")


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
