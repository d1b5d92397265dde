"""Worker: memory of a GPU that another process of the host opens (CUDA IPC), with two events.

Events that processes share order their streams, as events of one process do: a stream waits for
what was recorded last before the wait was called. Here a message comes between the two, so that is
never an earlier record.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.multiprocessing import reductions

from taskgrad.worker.devices import home


class CudaSlot:
    """Memory of this process; RuntimeError if the system or the allocator cannot share it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        with torch.cuda.device(device):
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._written = torch.cuda.Event(interprocess=True)
            self._read = torch.cuda.Event(interprocess=True)
            _, memory = reductions.reduce_tensor(self._memory)
            events = [event.ipc_handle() for event in (self._written, self._read)]
        self.opening: tuple[Any, ...] = (memory, events, identity_of(device))

    def write(self, flat: torch.Tensor) -> None:
        """Copy these bytes into it, after what this thread's stream has to do."""
        with torch.cuda.device(self._memory.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._read)  # as the receiver has recorded it for the value before
            self._memory[: flat.nbytes].copy_(flat, non_blocking=True)
            self._written.record(stream)


class OpenCudaSlot:
    """Memory of another process, on a GPU that this one sees; RuntimeError if that cannot be."""

    def __init__(self, memory: tuple[Any, ...], events: list[bytes], identity: str) -> None:
        self._device = _device_of(identity)
        # The numbers of GPUs differ between processes with other CUDA_VISIBLE_DEVICES.
        bound = inspect.signature(reductions.rebuild_cuda_tensor).bind(*memory)
        bound.arguments["storage_device"] = self._device.index
        with torch.cuda.device(self._device):
            self._memory: torch.Tensor = reductions.rebuild_cuda_tensor(*bound.args)
            self._written, self._read = (
                torch.cuda.Event.from_ipc_handle(self._device, handle) for handle in events
            )

    def read(self, nbytes: int) -> torch.Tensor:
        """Its first bytes, on this process's device, for this thread's stream.

        Between two GPUs torch copies on the stream of the one that is read, which those of the
        other one wait for: so that is where the events belong.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._written)
            found = torch.empty(nbytes, dtype=torch.uint8, device=home("cuda"))
            found.copy_(self._memory[:nbytes], non_blocking=True)
            self._read.record(stream)
        return found


def identity_of(device: torch.device) -> str:
    """The UUID of a GPU, the same in all processes."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_of(identity: str) -> torch.device:
    """The GPU with this UUID; RuntimeError if this process does not see it."""
    for index in range(torch.cuda.device_count()):
        if identity_of(torch.device("cuda", index)) == identity:
            return torch.device("cuda", index)
    raise RuntimeError(f"this process does not see the GPU {identity}")
