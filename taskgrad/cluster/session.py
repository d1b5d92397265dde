"""Driver: one session per Dask client: versions checked, plugins registered, workers in order."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import distributed
from distributed import Client

from taskgrad.arguments import shown, whole
from taskgrad.cluster import client_calls, environment, internals
from taskgrad.cluster.config import Settings
from taskgrad.cluster.exits import close_at_exit
from taskgrad.cluster.local import local_cluster, refuse_in_starting_process
from taskgrad.cluster.scheduler_plugin import JOIN, WORKERS_CHANGED, TaskgradSchedulerPlugin
from taskgrad.cluster.tasks import memory, worker_info
from taskgrad.cluster.worker_plugin import TaskgradWorkerPlugin
from taskgrad.errors import PlacementError, TaskgradError
from taskgrad.worker_names import WorkerName

logger = logging.getLogger("taskgrad")

WorkerSpec = int | str

# Workers that are closing, or could not import taskgrad when they joined: they do not answer.
_ENDING = ("closing", "closed", "failed")


@dataclass(frozen=True)
class WorkerInfo(WorkerName):
    """One worker of the cluster."""

    threads: int = 1


class Session:
    """One client with taskgrad's plugins on its scheduler and workers."""

    def __init__(self, client: Client) -> None:
        refuse_in_starting_process()
        self.client = client
        self.names: dict[str, Any] = {}
        """The name of every worker seen so far, by its address at the time."""
        self._threads = environment.Threads(self.named)
        settings = Settings.from_config()
        self._info()  # for the names in messages
        self._threads.add(environment.check(client, self.named))

        async def load() -> None:
            await client.register_plugin(TaskgradSchedulerPlugin())
            await client.register_plugin(TaskgradWorkerPlugin())
            join = getattr(client.scheduler, JOIN)
            await join(client=client.id, settings=settings.message())

        self._workers: list[WorkerInfo] | None = None  # as of the last change, if known
        self._asked: object = None
        self._is_told = internals.add_client_handler(
            client, WORKERS_CHANGED, partial(_forget_workers, weakref.ref(self))
        )
        client_calls.call_with_deadline(client, load, "to load taskgrad")
        close_at_exit(client)
        internals.apply_interval(client, settings.latency)

    def workers(self) -> list[WorkerInfo]:
        """The current workers, by name where names are numbers, else by address.

        PlacementError if there are none.
        """
        found = in_order(self._info())
        if not found:
            raise PlacementError(
                "the cluster has no workers: start some, or wait for them with "
                "client.wait_for_workers(n)"
            )
        return found

    def workers_since_change(self, count: int) -> list[WorkerInfo]:
        """As `workers`, without asking the scheduler again until it reports a change.

        It is asked if fewer than `count` are known: its report may be on its way.
        """
        check_open(self.client)
        known = self._workers
        if known is None or len(known) < count:
            # Before the answer, which a report that comes meanwhile makes obsolete.
            token = self._asked = object()
            known = self.workers()
            if self._is_told and self._asked is token:
                self._workers = known
        return known

    def forget_workers(self) -> None:
        """A worker has joined or left."""
        self._workers = self._asked = None

    def store_ids(self, addresses: list[str]) -> dict[str, str]:
        """The id of each worker's store, which changes with a restart."""
        ask = partial(self.client.run, worker_info, workers=addresses)
        found = client_calls.call_with_deadline(self.client, ask, "what their stores are")
        self._threads.add({address: threads for address, (_, threads) in found.items()})
        return {address: store for address, (store, _) in found.items()}

    def memory(self, addresses: list[str]) -> dict[str, tuple[int, int] | None]:
        """Bytes that each of these workers uses, and may use; None for one without a limit."""
        ask = partial(self.client.run, memory, workers=addresses)
        return client_calls.call_with_deadline(self.client, ask, "how much memory they use")

    def out_of_order(self, addresses: set[str]) -> dict[str, str]:
        """Those of these workers that run no task pinned to them, each with the reason.

        "gone": it has left, and none with its name has come since. "restarted": one with its name
        has, without what it held. "paused": it starts no tasks; reported only while none of these
        workers runs anything, since it may have nothing to do yet.
        """
        info = self._info()
        names = {self.names[a] for a in info}
        absent = {
            a: "restarted" if self.names.get(a, a) in names else "gone"
            for a in addresses - info.keys()
        }
        here = {a: info[a] for a in addresses & info.keys()}
        busy = any(w["metrics"].get("task_counts", {}).get("executing") for w in here.values())
        paused = {a for a, w in here.items() if w["status"] == "paused" and not busy}
        return absent | dict.fromkeys(paused, "paused")

    def unfinished(self, address: str) -> set[str]:
        """Keys of the tasks that were assigned to a lost worker and not finished."""
        scheduler: Any = self.client.scheduler
        ask = partial(scheduler.events, topic=address)
        events: Any = client_calls.call_with_deadline(
            self.client, ask, "what a lost worker had to do"
        )
        found: set[str] = set()
        for _, event in events:
            if isinstance(event, dict) and event.get("action") == "remove-worker":
                found.update(map(str, event.get("processing-tasks", ())))
        return found

    def named(self, address: str) -> WorkerName:
        """The worker of this address, which prints with its name."""
        return WorkerName(address, self.names.get(address))

    def describe(self, address: str) -> str:
        """A worker's name and address, for messages."""
        return f"worker {self.named(address)}"

    def known(self) -> list[WorkerInfo]:
        """The current workers, in no order; perhaps none."""
        return _workers_in(self._info())

    def _info(self) -> dict[str, Any]:
        """The scheduler's information on each worker that does not close, by address."""
        check_open(self.client)
        # Not client.scheduler_info: the client refreshes that by itself, without workers.
        scheduler: Any = self.client.scheduler
        ask = partial(scheduler.identity, n_workers=-1)
        found = client_calls.call_with_deadline(self.client, ask, "which workers there are")
        info = found["workers"]
        self.names |= {address: w.get("name", address) for address, w in info.items()}
        return {address: w for address, w in info.items() if w["status"] not in _ENDING}

    def resolve(self, spec: WorkerSpec, workers: Sequence[WorkerInfo] | None = None) -> str:
        """The address of a worker given by index, name or address; PlacementError if none is it."""
        workers = self.workers() if workers is None else workers
        if not isinstance(spec, str):
            try:
                spec = whole("a worker", spec)
            except TypeError:
                raise PlacementError(
                    f"a worker is an index, a name or an address; got {shown(spec)}"
                ) from None
        if isinstance(spec, int) and 0 <= spec < len(workers):
            return workers[spec].address
        for worker in workers:
            if worker.address == spec or str(worker.name) == str(spec):
                return worker.address
        known = "; ".join(f"{i}: {w}" for i, w in enumerate(workers))
        raise PlacementError(
            f"there is no worker {spec!r} on this cluster. Its workers are {known}"
        )


def _forget_workers(session: weakref.ref[Session]) -> None:
    found = session()
    if found is not None:
        found.forget_workers()


def in_order(info: dict[str, Any]) -> list[WorkerInfo]:
    """The workers in the scheduler's information, in the order of their indices."""
    return sorted(_workers_in(info), key=_worker_order)


def _workers_in(info: dict[str, Any]) -> list[WorkerInfo]:
    return [WorkerInfo(a, w.get("name", a), w["nthreads"]) for a, w in info.items()]


def _worker_order(worker: WorkerInfo) -> tuple[bool, int, str]:
    name = str(worker.name)
    return (not name.isdigit(), int(name) if name.isdigit() else 0, worker.address)


# Open clients only. The reference also keeps a cluster alive that was started implicitly.
_sessions: dict[Client, Session] = {}
_lock = threading.RLock()
_forked = False


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.RLock()  # a thread of the parent may have held it
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def session(client: Client | None = None) -> Session:
    """The session of this client, else of the current client, else of a new local cluster.

    TaskgradError if the client is closed or asynchronous; ClusterMismatchError if client, scheduler
    and workers run different versions.
    """
    with _lock:
        if client is None:
            client = _current_client()
        check_open(client)
        for known in [c for c in _sessions if c.status != "running"]:
            del _sessions[known]
        if client not in _sessions:
            _sessions[client] = Session(client)
        return _sessions[client]


def current_session() -> Session | None:
    """The session of the current client, or None; starts no cluster."""
    try:
        return session(distributed.get_client())
    except ValueError:
        return None


def _current_client() -> Client:
    try:
        return distributed.get_client()
    except ValueError:
        client = local_cluster()
        logger.warning(
            "taskgrad found no Dask client and started a local cluster of 2 workers (dashboard: "
            "%s). To choose your own, open a distributed.Client first.",
            client.dashboard_link,
        )
        return client


def check_open(client: Any) -> None:
    """Raise unless this is a connected, synchronous Dask client."""
    if not isinstance(client, Client):
        raise TypeError(f"client must be a distributed.Client; got {type(client).__name__}")
    if client.asynchronous:
        raise TaskgradError(
            "taskgrad needs a synchronous client: this one was made with asynchronous=True, or is "
            "used inside its own event loop. Open Client(address) for taskgrad, in a thread if "
            "your program is async"
        )
    if _forked and not internals.loop_runs(client):
        raise TaskgradError(
            "this process was forked from one with a Dask client, which does not work here: none "
            'of its threads came along. Start processes with the method "spawn", or open a client '
            "in this process, Client(address), and give it to taskgrad (client=)"
        )
    if client.status == "connecting":
        raise TaskgradError(
            "the Dask client has lost the connection to its scheduler, and with it its chains and "
            "thunks. Check that the scheduler still runs, open a client and make them again"
        )
    if client.status != "running":
        raise TaskgradError(
            f"the Dask client is {client.status}: its chains and thunks are gone with it. "
            "Open a client and make them again"
        )
