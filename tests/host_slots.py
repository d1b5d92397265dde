"""Slots of host memory in place of a GPU's: files that two processes map."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from taskgrad.cluster import program_hosts
from taskgrad.cluster.channels import device_slots, peer_devices
from taskgrad.worker.devices import home

_STOCK = device_slots.shared_kind


class HostSlot:
    """Memory that is overwritten before each write, so that no old value passes for a new one."""

    made = 0

    def __init__(self, nbytes: int, device: torch.device) -> None:
        handle, self.path = tempfile.mkstemp(prefix="taskgrad-slot-", dir="/dev/shm")
        os.close(handle)
        HostSlot.made += 1
        self.nbytes = nbytes
        self._memory = mapped(self.path, nbytes)
        self.opening = (self.path, nbytes, device.type)

    def write(self, flat: torch.Tensor) -> None:
        self._memory.fill_(0xAB)
        self._memory[: flat.nbytes].copy_(flat)

    def __del__(self) -> None:
        Path(self.path).unlink(missing_ok=True)


class OpenHostSlot:
    def __init__(self, path: str, nbytes: int, kind: str) -> None:
        self._memory = mapped(path, nbytes)
        self._kind = kind

    def read(self, nbytes: int) -> torch.Tensor:
        return self._memory[:nbytes].clone().to(home(self._kind))


def mapped(path: str, nbytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


def cannot_open(*opening: Any) -> Any:
    raise RuntimeError("peer access is not supported between these two devices")


def use(kind: str = "cpu", opens: Any = OpenHostSlot) -> None:
    """Have this process send tensors of this kind of device as those of a GPU."""
    device_slots.KINDS[kind] = HostSlot, opens
    device_slots.shared_kind = peer_devices.shared_kind = lambda: kind


def use_none(kind: str = "cpu") -> None:
    """Undo `use`."""
    device_slots.KINDS.pop(kind, None)
    device_slots.shared_kind = peer_devices.shared_kind = _STOCK


def without() -> None:
    """Have this process use no slots."""
    peer_devices.shared_kind = lambda: None


def as_before() -> None:
    """Undo `without`."""
    peer_devices.shared_kind = _STOCK


def counts(dask_worker: Any) -> dict[str, int]:
    """Of this worker's channels: slots that are free, those with values, and those open."""
    hosts = program_hosts._hosts[dask_worker].named.values()
    peers = [p for h in hosts if hasattr(h.channels, "_peers") for p in h.channels._peers.values()]
    return {
        "ready": sum(p.devices.slots.is_ready for p in peers),
        "free": sum(len(p.devices.slots._free) for p in peers),
        "used": sum(len(p.placed) for p in peers),
        "open": sum(len(p.devices.slots._open) for p in peers),
    }
