"""Our store on every worker, and the sweep that empties it, as Dask plugins.

The scheduler knows when a key is forgotten: nobody holds its future, nothing waits for it, or the
client that wanted it is gone. The plugin there passes that on to the worker that ran the task; the
one on the worker releases what the store holds under the key. So nothing is left behind however a
driver ends.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from distributed import Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin
from distributed.scheduler import TaskState, WorkerState

from taskgrad.cluster import internals
from taskgrad.cluster.config import Settings, Users
from taskgrad.cluster.messages.rank_comms import Post
from taskgrad.cluster.retirement import Holders, Reporter
from taskgrad.cluster.tuning import intervals, malloc, server_settings
from taskgrad.cluster.wire import message_leases, result_table
from taskgrad.cluster.wire import serialize as _serialize  # noqa: F401  registers the tensor family
from taskgrad.worker.memory import Held, total_bytes
from taskgrad.worker.store import Store

NAME = "taskgrad"
# Tasks of ours have this annotation: the name of the worker that they are pinned to. They leave
# something in its store.
ANNOTATION = "taskgrad"
_RELEASE = "taskgrad-release"
_SETTINGS = "taskgrad-settings"
_GONE = "taskgrad-gone"
JOIN = "taskgrad_join"
"""A client's call to the scheduler: it uses taskgrad from now on, with these settings."""

_stores: weakref.WeakKeyDictionary[Worker, Store] = weakref.WeakKeyDictionary()


def store_of(worker: Worker) -> Store:
    """This worker's store. A process may hold several workers, each with its own."""
    return _stores.setdefault(worker, Store(worker.address, worker.local_directory))


_METRICS = tuple(field.name for field in fields(Held))
_BORROWED = "cross_memory"


class _Counts:
    """What a store holds, as metrics that go with a worker's heartbeat: bytes, counted once each.

    A heartbeat reads all of them, one after the other, in the event loop.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unread: dict[str, int] = {}

    def read(self, name: str, worker: Worker) -> int:
        if name not in self._unread:
            self._unread = total_bytes(self._store.entries())
        return self._unread.pop(name)


def _borrowed(worker: Worker) -> int:
    """Another: bytes that the worker's process has read from the memory of others."""
    return message_leases.bytes_read()


class StorePlugin(WorkerPlugin):
    """Gives a worker its store and takes the scheduler's word on what to release."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Called once on each worker, those that join later too."""
        store = store_of(worker)
        self._results: result_table.ResultTable | None = None

        def release(keys: list[str]) -> None:
            store.release(keys)

        def change(**settings: Any) -> None:
            _change(worker, Settings(**settings))
            self._results = result_table.table_of(worker)

        def gone(address: str) -> None:
            store.mail.gone(address)

        worker.stream_handlers[_RELEASE] = release
        worker.stream_handlers[_GONE] = gone
        worker.stream_handlers[_SETTINGS] = change
        self._reporter = Reporter(worker, store)
        self._post = Post(worker, store.mail)
        malloc.check_threads(worker)
        counts = _Counts(store)
        for name in _METRICS:  # columns of the dashboard's table of workers
            worker.metrics[f"{NAME}_{name}"] = functools.partial(counts.read, name)
        worker.metrics[f"{NAME}_{_BORROWED}"] = _borrowed

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """What was computed can be read by others from now on, what is released no more."""
        if self._results is not None:
            self._results.task_moved(key, start, finish)

    def teardown(self, worker: Worker) -> None:
        """Called when the worker closes."""
        _change(worker, Settings())
        self._results = None
        self._reporter.stop()
        self._post.stop()
        # Messages may still be on their way to a worker that closes.
        for name in (_RELEASE, _SETTINGS, _GONE):
            worker.stream_handlers[name] = _ignore
        for name in (*_METRICS, _BORROWED):
            worker.metrics.pop(f"{NAME}_{name}", None)
        _stores.pop(worker, None)


def _ignore(**message: Any) -> None:
    pass


def _change(worker: Worker, settings: Settings) -> None:
    intervals.apply_worker(worker, settings.latency)
    if settings.allocator:
        malloc.apply(worker)
    else:
        malloc.restore(worker)
    if settings.cross_memory:
        message_leases.apply(worker)
        result_table.apply(worker)
    else:
        result_table.restore(worker)
        message_leases.restore(worker)
    server_settings.PAUSE.hold(worker, settings.pause)
    server_settings.PROFILE.hold(worker, settings.profile)
    server_settings.TICK.hold(worker, settings.tick)


class SchedulerSide(SchedulerPlugin):
    """Tells workers which of their keys are forgotten and which settings hold; keeps pins true.

    It also keeps workers that hold something from being retired: see `taskgrad.cluster.retirement`.

    Dask pins a task to an address. A worker that was restarted has another one under its old name;
    a task that is pinned to the old address would wait for ever.
    """

    name = NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called once on the scheduler."""
        self._scheduler = scheduler
        self._holders = Holders(scheduler, _is_ours)
        self._users = Users()
        scheduler.handlers[JOIN] = self._join

    def _join(self, client: str, settings: dict[str, Any]) -> None:
        if client in self._scheduler.clients:
            self._users.join(client, Settings(**settings))
            self._change(list(self._scheduler.workers))

    def _change(self, workers: Iterable[str] = ()) -> None:
        """Have the settings of now hold on the scheduler, and on these workers."""
        settings = self._users.settings
        intervals.apply_scheduler(self._scheduler, settings.latency)
        for server in (self._scheduler, *internals.nannies_beside(self._scheduler)):
            server_settings.TICK.hold(server, settings.tick)
        for address in workers:
            self._scheduler.worker_send(address, {"op": _SETTINGS, **settings.message()})

    def add_client(self, scheduler: Scheduler, client: str) -> None:
        """The stream to a new client is made right after this."""
        scheduler.loop.add_callback(self._change)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """With the last client that uses taskgrad, what it changed is set back."""
        if self._users.leave(client):
            self._change(list(scheduler.workers))

    def update_graph(self, scheduler: Scheduler, *, tasks: list[Any], **kwargs: Any) -> None:
        """Pins that were stale when they arrived."""
        self._repin([scheduler.tasks[key] for key in tasks])

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Pins that wait for this worker under its old address; its settings."""
        if self._users:  # it reads them after it has set up its plugins
            self._change([worker])
        self._repin(scheduler.tasks.values())

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """What it held is gone with it; ranks that wait for one of its are told."""
        self._holders.gone(worker)
        for address in list(scheduler.stream_comms):
            scheduler.worker_send(address, {"op": _GONE, "address": worker})

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Dask chooses workers to close; it may have those that hold nothing of ours."""
        return self._holders.without(workers)

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
        """Remember who runs a key of ours; release it there when it is forgotten."""
        if finish == "processing":
            task = self._scheduler.tasks[key]
            if _is_ours(task) and task.processing_on:
                self._holders.ran(key, task.processing_on.address)
        elif finish == "forgotten":
            address = self._holders.forget(key)
            if address in self._scheduler.stream_comms:
                self._scheduler.worker_send(address, {"op": _RELEASE, "keys": [key]})
                self._holders.look(address)


def _is_ours(task: TaskState) -> bool:
    return ANNOTATION in (task.annotations or {})
