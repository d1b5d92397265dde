"""Rank 0 of an MPI job: opens the cluster that the other ranks join, and ends the job."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter

from distributed import Client
from distributed.utils import get_ip

from taskgrad.cluster.config import deadline
from taskgrad.cluster.local import local_cluster
from taskgrad.errors import TaskgradError
from taskgrad.launch import messages
from taskgrad.launch.worker_rank import EXIT, EXIT_GRACE_S, StartFailed, WorkerOptions

_POLL_S = 0.05  # between two checks which workers are there


class Coordinator:
    """The scheduler of all ranks' workers, in this process, and its client."""

    def __init__(self) -> None:
        self._ranks = range(1, messages.numbers()[1])
        self._present: set[int] = set()
        self._client: Client | None = None

    def start(self, interface: str | None) -> None:
        """Open the cluster, and wait until every rank is a worker of it.

        Raises TaskgradError if ranks are missing after ``taskgrad.start-deadline``, or could not
        start their workers; the message says which.
        """
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        end = time.monotonic() + deadline("start")
        hosts = messages.receive_each(self._ranks, deadline("start"))
        self._present = set(hosts)
        if len(hosts) < len(self._ranks):
            missing = sorted(set(self._ranks) - set(hosts))
            raise TaskgradError(
                f"{_named(missing)} of {len(self._ranks) + 1} did not come to tg.main within "
                f"{deadline('start'):g} s. Every rank has to run the same file up to there; what "
                "takes long belongs after it, or raise Dask's setting taskgrad.start-deadline"
            )
        elsewhere = next((host for host in hosts.values() if host != messages.host()), None)
        # With all ranks on one host, nothing need be reached from elsewhere.
        here = None if elsewhere or interface else "127.0.0.1"
        at = get_ip(elsewhere) if elsewhere and not interface else here
        self._client = local_cluster(n_workers=0, host=at, interface=interface)
        neighbours = Counter(hosts.values())
        for rank, name in hosts.items():
            options = WorkerOptions(_scheduler(self._client), here, neighbours[name])
            messages.send(rank, options)
        self._wait_for_workers(end)

    def _wait_for_workers(self, end: float) -> None:
        assert self._client is not None
        while missing := self._without_worker(self._client):
            for rank in missing:
                failed = messages.receive(rank, 0)
                if isinstance(failed, StartFailed):
                    raise TaskgradError(f"the worker of rank {rank} did not start: {failed.why}")
            if time.monotonic() > end:
                raise TaskgradError(
                    f"the workers of {_named(missing)} did not reach the scheduler of rank 0 at "
                    f"{_scheduler(self._client)} within {deadline('start'):g} s. Is that "
                    "the network between the hosts? tg.main(__name__, interface='ib0') takes "
                    "another one. Or raise Dask's setting taskgrad.start-deadline"
                )
            time.sleep(_POLL_S)

    def _without_worker(self, client: Client) -> list[int]:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        return sorted(set(self._ranks) - {worker["name"] for worker in workers})

    def close(self) -> None:
        """Tell the other ranks to exit and wait until they do, else abort the job.

        MPI cannot be finalized without them.
        """
        for rank in self._present:  # first: so that a worker that loses its scheduler knows why
            messages.send(rank, EXIT)
        if self._client is not None:
            self._client.close()
        end = time.monotonic() + EXIT_GRACE_S
        exited = {rank for rank in self._present if self._exits(rank, end)}
        missing = sorted(set(self._ranks) - exited)
        if missing:
            print(
                f"taskgrad: {_named(missing)} did not leave, so the job is aborted",
                file=sys.stderr,
            )
            messages.abort()
        messages.finalize(EXIT_GRACE_S)

    def _exits(self, rank: int, end: float) -> bool:
        while (message := messages.receive(rank, max(0.0, end - time.monotonic()))) is not None:
            if message == EXIT:
                return True
        return False


def _end_with(launcher: int) -> None:
    """End this process once the launcher is gone: Open MPI's ends no process when it is killed.

    The other ranks end when they lose this one.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    print("taskgrad: rank 0 ends, as the launcher (mpirun) is gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _scheduler(client: Client) -> str:
    return str(client.scheduler_info(n_workers=0)["address"])


def _named(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:20])) + (", ..." if len(ranks) > 20 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"
