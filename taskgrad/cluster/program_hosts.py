"""Worker: the resident programs of this worker, by name; their drivers connect to them here."""

from __future__ import annotations

import weakref
from typing import Any

from distributed import Worker, get_worker
from distributed.comm.core import Comm
from distributed.core import Status

from taskgrad.cluster.channels.dask_comms import CHANNEL, DaskChannels
from taskgrad.cluster.channels.links import Link
from taskgrad.cluster.closing import hang_up, stop_answering
from taskgrad.cluster.program_host import ProgramHost
from taskgrad.errors import WorkerLostError
from taskgrad.worker.store import Store
from taskgrad.worker_names import WorkerName

PROGRAM = "taskgrad_program"
"""A worker's handler for the connection of a driver."""

_hosts: weakref.WeakKeyDictionary[Worker, ProgramHosts] = weakref.WeakKeyDictionary()


def run_program(name: str) -> int:
    """Take steps of this worker's program of that name, in a task; returns how many.

    WorkerLostError if the worker has no such program.
    """
    worker = get_worker()
    hosts = _hosts.get(worker)
    host = None if hosts is None else hosts.named.get(name)
    if host is None:
        raise WorkerLostError(
            f"worker {WorkerName(worker.address, worker.name)} has no program {name}: it was "
            "restarted, or its driver has closed the connection"
        )
    return host.resident.run()


class ProgramHosts:
    """All programs of one worker, by name."""

    def __init__(self, worker: Worker, store: Store) -> None:
        self.named: dict[str, ProgramHost] = {}
        self._worker = worker
        self._store = store
        _hosts[worker] = self
        worker.handlers[PROGRAM] = self._serve
        worker.handlers[CHANNEL] = self._receive

    def stop(self) -> None:
        """Called when the worker closes."""
        for host in self.named.values():
            host.worker_closes()
        stop_answering(self._worker, PROGRAM, CHANNEL)

    def task_is_ready(self) -> None:
        """A task waits for a thread, which a program may have."""
        for host in self.named.values():
            host.wake()

    def link_to(self, address: str, client: str) -> Link | None:
        """A link of this client's to another worker, if there is one."""
        for host in list(self.named.values()):
            link = host.link if host.client == client and host.is_connected else None
            if link is not None and link.reaches(address):
                return link
        return None

    def client_left(self, client: str) -> None:
        """A client has closed, or is gone: end its programs."""
        for host in self.named.values():
            if host.client == client:
                host.hang_up()

    async def _serve(self, comm: Comm, name: str, **about: Any) -> Any:
        host = ProgramHost(self._worker, self._store, comm, name, **about)
        self.named[name] = host
        try:
            await host.serve()
        finally:
            host.resident.close()
            del self.named[name]
            await host.close()
        return Status.dont_reply

    async def _receive(self, comm: Comm, name: str, rank: int) -> Any:
        host = self.named.get(name)
        if host is None:  # its driver has closed it
            return await hang_up(comm)
        assert isinstance(host.channels, DaskChannels)
        return await host.channels.receive(comm, rank)
