"""Worker: process groups of NCCL between the GPUs of two workers.

A send or receive on NCCL's stream waits for what the current stream had to do when it was posted,
and `Work.wait` has the current stream wait for it; the thread never does. So both are posted on
streams of their own, which are ordered with the training's by events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from taskgrad.cluster.channels.cuda_slot import identity_of
from taskgrad.worker.devices import home


def identity() -> tuple[str, Any]:
    """The GPU of this worker's layers, and NCCL's version."""
    return identity_of(_device()), torch.cuda.nccl.version()


class _Staged(NamedTuple):
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

    def __init__(self, store: dist.Store, place: int) -> None:
        self.device = _device()
        self._place = place
        # By sender. Where a counterpart never comes torch ends the process after 10 minutes; but
        # when a worker is gone, its connection ends, and with that the groups.
        self._groups = [
            dist.ProcessGroupNCCL(dist.PrefixStore(f"taskgrad{sender}", store), place, 2)
            for sender in (0, 1)
        ]
        self._sends = torch.cuda.Stream(self.device)
        self._receives = torch.cuda.Stream(self.device)

    def stage(self, parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> _Staged:
        """Copy tensors of bytes to these offsets of new memory, on this thread's stream."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for start, flat in parts:
            memory[start : start + flat.nbytes].copy_(flat, non_blocking=True)
        return _Staged(memory, torch.cuda.current_stream(self.device).record_event())

    def send(self, staged: _Staged) -> None:
        """Post a send; no thread waits for it."""
        with torch.cuda.stream(self._sends):
            self._sends.wait_event(staged.written)
            self._groups[self._place].send([staged.memory], 1 - self._place, 0).wait()
            staged.memory.record_stream(self._sends)  # for others only when it has been sent

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
