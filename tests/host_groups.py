"""Process groups over gloo in place of NCCL's: what waits there on a device waits in `take`."""

from __future__ import annotations

import copy
import datetime
import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from taskgrad.cluster import program_hosts
from taskgrad.cluster.channels import device_group
from taskgrad.worker.devices import home

_STOCK = device_group.grouped_kind
_SECONDS = datetime.timedelta(seconds=20)


class Posted:
    def __init__(self, memory: torch.Tensor, work: Any, device: torch.device) -> None:
        self.memory, self.device = memory, device
        self.work: Any = work

    def take(self) -> torch.Tensor:
        if self.work is not None:  # gloo would wait for another one
            self.work.wait()
            self.work, self.memory = None, self.memory.to(self.device)
        return self.memory


class HostPair:
    """Memory of the host, also for devices of which gloo knows nothing."""

    def __init__(self, store: dist.Store, place: int, kind: str) -> None:
        self.device = home(kind)
        if kind != "cpu" and self.device.index is None:
            self.device = torch.device(kind, 0)
        self.place = place
        self.sends = 0
        self.log: list[str] = []
        self.under_way: list[Any] = []  # the works, with their memory
        self.groups = [
            dist.ProcessGroupGloo(dist.PrefixStore(str(sender), store), place, 2, _SECONDS)
            for sender in (0, 1)
        ]

    def gather(self, parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xAB, dtype=torch.uint8)
        for start, flat in parts:
            memory[start : start + flat.nbytes].copy_(flat)
        return memory

    def send(self, memory: torch.Tensor) -> None:
        self.sends += 1
        self.log.append("send")
        work = self.groups[self.place].send([memory], 1 - self.place, 0)
        self.under_way.append((work, memory))

    def room(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xCD, dtype=torch.uint8)

    def receive(self, memory: torch.Tensor) -> Posted:
        self.log.append("receive")
        work = self.groups[1 - self.place].recv([memory], 1 - self.place, 0)
        self.under_way.append((work, memory))
        return Posted(memory, work, self.device)

    def abort(self) -> None:
        for group in self.groups:
            group.abort()


class Host:
    """A kind of groups whose devices are processes, or ends of one."""

    def __init__(self, kind: str, same: bool = False) -> None:
        self.kind, self.same = kind, same

    def identity(self) -> tuple[str, Any]:
        return "one" if self.same else uuid.uuid4().hex, 1

    def form(self, store: dist.Store, place: int) -> HostPair:
        return HostPair(store, place, self.kind)


def use(kind: str = "cpu", made: Any = None) -> None:
    """Have this process send tensors of this kind of device as those of a GPU on another host."""
    host = made or Host(kind)
    device_group.KINDS[kind] = lambda: device_group.Kind(host.identity, host.form)
    device_group.grouped_kind = lambda: kind


def use_none(kind: str = "cpu") -> None:
    """Undo `use`."""
    device_group.KINDS.pop(kind, None)
    device_group.grouped_kind = _STOCK


def counts(dask_worker: Any) -> dict[str, int]:
    """Of this worker's channels: groups that are ready, those that wait, and values announced."""
    hosts = program_hosts._hosts[dask_worker].named.values()
    peers = [p for h in hosts if hasattr(h.channels, "_peers") for p in h.channels._peers.values()]
    groups = [p.devices.group for p in peers if p.devices.group is not None]
    return {
        "ready": sum(group.is_ready for group in groups),
        "busy": sum(group.is_busy for group in groups),
        "announced": sum(next(copy.copy(group._numbers)) for group in groups),
    }
