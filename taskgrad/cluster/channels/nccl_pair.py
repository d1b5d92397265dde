"""Worker: process groups of NCCL between the GPUs of two workers.

A send or receive on NCCL's stream waits for what the current stream had to do when it was posted,
and `Work.wait` has the current stream wait for it; the thread never does. So both are posted on
streams of their own, which are ordered with the training's by events.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import PrefixStore, ProcessGroupNCCL, Store  # type: ignore[attr-defined]

from taskgrad.cluster.channels.cuda_slot import identity_of
from taskgrad.worker.devices import home

# Which a group reads when it is made. Torch would end this process when the other one is gone, or
# when a thread of torch's has not run for long; here the groups end with the workers' connection.
_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_reading_settings = threading.Lock()


def identity() -> tuple[str, Any]:
    """The GPU of this worker's layers, and NCCL's version."""
    return identity_of(_device()), torch.cuda.nccl.version()


class _Gathered(NamedTuple):
    memory: torch.Tensor
    written: torch.cuda.Event


class _Received(NamedTuple):
    memory: torch.Tensor
    there: torch.cuda.Event

    def take(self) -> torch.Tensor:
        """The memory, for this thread's stream once the bytes are there."""
        stream = torch.cuda.current_stream(self.memory.device)
        stream.wait_event(self.there)
        self.memory.record_stream(stream)  # it is of the receiving stream's pool
        return self.memory


class NcclPair:
    """See `taskgrad.cluster.channels.device_group.Pair`. RuntimeError: NCCL cannot be used here."""

    def __init__(self, store: Store, place: int) -> None:
        if not hasattr(ProcessGroupNCCL, "abort"):
            raise RuntimeError("this version of torch cannot end a group")
        self.device = _device()
        self._place = place
        self._groups: list[Any] = []  # by sender
        with _reading_settings:
            before = {name: os.environ.get(name) for name in _SETTINGS}
            os.environ.update(_SETTINGS)
            try:
                for sender in (0, 1):
                    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
                    own = PrefixStore(f"taskgrad{sender}", store)
                    self._groups.append(ProcessGroupNCCL(own, place, 2, options))
            finally:
                for name, value in before.items():
                    os.environ.pop(name)
                    if value is not None:
                        os.environ[name] = value
        self._sends = torch.cuda.Stream(self.device)
        self._receives = torch.cuda.Stream(self.device)

    def gather(self, parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> _Gathered:
        """Copy tensors of bytes to these offsets of new memory, on this thread's stream."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for start, flat in parts:
            memory[start : start + flat.nbytes].copy_(flat, non_blocking=True)
        return _Gathered(memory, torch.cuda.current_stream(self.device).record_event())

    def send(self, gathered: _Gathered) -> None:
        """Post a send; no thread waits for it."""
        # The memory is for others only when it has been sent. The call may wait for the allocator,
        # which may wait for the device: so it comes first.
        gathered.memory.record_stream(self._sends)
        with torch.cuda.stream(self._sends):
            self._sends.wait_event(gathered.written)
            self._groups[self._place].send([gathered.memory], 1 - self._place, 0).wait()

    def room(self, nbytes: int) -> torch.Tensor:
        """Memory to receive in."""
        with torch.cuda.stream(self._receives):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def receive(self, memory: torch.Tensor) -> _Received:
        """Post a receive."""
        with torch.cuda.stream(self._receives):
            self._groups[1 - self._place].recv([memory], 1 - self._place, 0).wait()
            return _Received(memory, self._receives.record_event())

    def abort(self) -> None:
        """End what is posted, and the groups; any thread may call."""
        for group in self._groups:
            group.abort()


def _device() -> torch.device:
    found = home("cuda")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())
