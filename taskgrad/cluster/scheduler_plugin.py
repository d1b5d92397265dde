"""Scheduler: the Dask plugin that tells workers what to release and which settings hold.

The scheduler knows when a key is forgotten: no client holds its future and no task depends on it,
or its client is gone. The plugin then tells the worker that ran the task to release what its store
holds under the key. So nothing is left behind however a driver ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import TaskState, WorkerState

from taskgrad.cluster import internals, task_colours
from taskgrad.cluster.config import Settings, merge
from taskgrad.cluster.retirement import RetirementGuard
from taskgrad.cluster.tuning import server_settings
from taskgrad.cluster.worker_plugin import CLIENT_LEFT, NAME, RELEASE, SETTINGS, WORKER_LOST

ANNOTATION = "taskgrad"
"""Of each task that leaves something in a store: the name of the worker that it is pinned to."""
JOIN = "taskgrad_join"
"""A client's call to the scheduler: it uses taskgrad from now on, with these settings."""
RAN = "taskgrad-ran"
"""A client's message: what a worker's program did."""
HOLD, DROP = "taskgrad-hold", "taskgrad-drop"
"""A client's messages: a worker keeps something under these keys, not of a task; until then."""
WORKERS_CHANGED = "taskgrad-workers-changed"
"""The scheduler's message to clients: a worker has joined or left."""


class TaskgradSchedulerPlugin(SchedulerPlugin):
    """Releases forgotten keys, distributes settings, guards against retirement, and moves pins.

    Dask pins a task to an address. A worker that was restarted has another address under its old
    name; a task pinned to the old one would wait for ever.
    """

    name = NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called once on the scheduler."""
        self._scheduler = scheduler
        self._guard = RetirementGuard(scheduler, _is_ours)
        self._clients: dict[str, Settings] = {}  # of those that use taskgrad, by id
        self._held: dict[str, set[str]] = {}  # keys that are no task's, by client
        task_colours.apply()
        scheduler.handlers[JOIN] = self._join
        scheduler.stream_handlers[RAN] = self._ran
        scheduler.stream_handlers[HOLD] = self._hold
        scheduler.stream_handlers[DROP] = self._drop

    def _join(self, client: str, settings: dict[str, Any]) -> None:
        if client in self._scheduler.clients:
            self._clients[client] = Settings(**settings)
            self._apply(list(self._scheduler.workers))

    def _ran(self, client: str, worker: str, thread: int, rows: list[Any]) -> None:
        internals.show_in_task_stream(self._scheduler, worker, thread, rows)

    def _hold(self, client: str, worker: str, keys: list[str]) -> None:
        self._held.setdefault(client, set()).update(keys)
        for key in keys:
            self._guard.task_started(key, worker)

    def _drop(self, client: str, keys: Iterable[str]) -> None:
        held = self._held.get(client, set())
        for key in held.intersection(keys):
            self._release(key)
        held.difference_update(keys)

    def _release(self, key: str) -> None:
        """Nobody needs any more what a worker holds under this key."""
        address = self._guard.key_forgotten(key)
        if address in self._scheduler.stream_comms:
            self._scheduler.worker_send(address, {"op": RELEASE, "keys": [key]})
            self._guard.released(address)

    def _apply(self, workers: Iterable[str] = ()) -> None:
        """Apply the settings of now to the scheduler, and send them to these workers."""
        settings = merge(self._clients.values())
        internals.apply_interval(self._scheduler, settings.latency)
        for server in (self._scheduler, *internals.nannies_beside(self._scheduler)):
            server_settings.TICK.apply(server, settings.tick)
        for address in workers:
            self._scheduler.worker_send(address, {"op": SETTINGS, **settings.message()})

    def add_client(self, scheduler: Scheduler, client: str) -> None:
        """The stream to a new client is made right after this."""
        scheduler.loop.add_callback(self._apply)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """A client has left or was killed; with the last one settings are restored."""
        self._drop(client, list(self._held.get(client, ())))
        self._held.pop(client, None)
        if self._clients.pop(client, None) is not None:
            self._apply(list(scheduler.workers))
            for address in list(scheduler.stream_comms):
                scheduler.worker_send(address, {"op": CLIENT_LEFT, "client": client})

    def update_graph(self, scheduler: Scheduler, *, tasks: list[Any], **kwargs: Any) -> None:
        """Move pins that were stale when they arrived."""
        self._repin([scheduler.tasks[key] for key in tasks])

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Send a new worker its settings; move pins to it from its old address."""
        if self._clients:  # it reads them after it has set up its plugins
            self._apply([worker])
        self._repin(scheduler.tasks.values())
        self._tell_clients()

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Tell the other workers, whose ranks may wait for one of this worker's."""
        self._guard.worker_removed(worker)
        for address in list(scheduler.stream_comms):
            scheduler.worker_send(address, {"op": WORKER_LOST, "address": worker})
        self._tell_clients()

    def _tell_clients(self) -> None:
        for client in self._clients:
            stream = self._scheduler.client_comms.get(client)
            if stream is not None:
                stream.send({"op": WORKERS_CHANGED})

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Dask chooses workers to close from those that hold nothing of ours."""
        return self._guard.retirable(workers)

    def _repin(self, tasks: Iterable[TaskState]) -> None:
        scheduler = self._scheduler
        for task in tasks:
            pins = task.worker_restrictions
            if not pins or not task.annotations or not pins.isdisjoint(scheduler.workers):
                continue
            now = scheduler.aliases.get(task.annotations.get(ANNOTATION))
            if now is not None:
                task.worker_restrictions = {now}

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Note which worker runs a key of ours; release it there when it is forgotten."""
        if finish == "processing":
            task = self._scheduler.tasks[key]
            if _is_ours(task) and task.processing_on:
                self._guard.task_started(key, task.processing_on.address)
        elif finish == "forgotten":
            self._release(key)


def _is_ours(task: TaskState) -> bool:
    return ANNOTATION in (task.annotations or {})
