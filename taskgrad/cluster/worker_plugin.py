"""Worker: its store, and the Dask plugin that connects it with the scheduler's plugin."""

from __future__ import annotations

import functools
import weakref
from dataclasses import fields
from typing import Any

from distributed import Worker
from distributed.diagnostics.plugin import WorkerPlugin

from taskgrad.cluster import internals, task_logs
from taskgrad.cluster.closing import stop_listening
from taskgrad.cluster.config import Settings
from taskgrad.cluster.messages.rank_comms import DaskTransport
from taskgrad.cluster.program_hosts import ProgramHosts
from taskgrad.cluster.retirement import OccupancyReporter
from taskgrad.cluster.tuning import malloc, server_settings
from taskgrad.cluster.wire import message_leases, result_table
from taskgrad.cluster.wire import serialize as _serialize  # noqa: F401  registers the tensor family
from taskgrad.worker.memory import PARTS, MemoryUsage, total_bytes
from taskgrad.worker.store import Store
from taskgrad.worker_names import WorkerName

NAME = "taskgrad"
"""Of the plugins, on workers and scheduler."""
RELEASE = "taskgrad-release"
"""The scheduler's message that these keys are forgotten."""
SETTINGS = "taskgrad-settings"
"""Its message that these settings hold from now on."""
WORKER_LOST = "taskgrad-worker-lost"
"""Its message that another worker has left."""
CLIENT_LEFT = "taskgrad-client-left"
"""Its message that a client has left."""

_stores: weakref.WeakKeyDictionary[Worker, Store] = weakref.WeakKeyDictionary()


def store_of(worker: Worker) -> Store:
    """This worker's store. A process may hold several workers, each with its own."""
    return _stores.setdefault(
        worker, Store(WorkerName(worker.address, worker.name), worker.local_directory)
    )


def _workers() -> list[Worker]:
    return list(_stores)


_METRICS = (*(field.name for field in fields(MemoryUsage)), PARTS)
_BYTES_READ = f"{NAME}_cross_memory"


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


class TaskgradWorkerPlugin(WorkerPlugin):
    """Sets up a worker's store, and releases from it what the scheduler says is forgotten."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Called once on each worker, those that join later too."""
        store = store_of(worker)
        self._results: result_table.ResultTable | None = None

        def change(**settings: Any) -> None:
            _apply(worker, Settings(**settings))
            self._results = result_table.table_of(worker)

        worker.stream_handlers[RELEASE] = store.release
        worker.stream_handlers[WORKER_LOST] = lambda address: store.mailboxes.gone(address)
        worker.stream_handlers[SETTINGS] = change
        self._reporter = OccupancyReporter(worker, store)
        self._programs = ProgramHosts(worker, store)
        self._transport = DaskTransport(worker, store.mailboxes, self._programs.link_to)
        worker.stream_handlers[CLIENT_LEFT] = self._programs.client_left
        malloc.check_threads(worker)
        task_logs.shorten(_workers)
        counts = _Counts(store)
        for name in _METRICS:  # columns of the dashboard's table of workers
            worker.metrics[f"{NAME}_{name}"] = functools.partial(counts.read, name)
        worker.metrics[_BYTES_READ] = lambda worker: message_leases.bytes_read()

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Publish a task's result when it is computed, until it is released."""
        if finish == "ready":
            self._programs.task_is_ready()
        if self._results is not None:
            self._results.task_moved(key, start, finish)

    def teardown(self, worker: Worker) -> None:
        """Called when the worker closes."""
        _apply(worker, Settings())
        self._results = None
        self._reporter.stop()
        self._transport.stop()
        self._programs.stop()
        stop_listening(worker, RELEASE, SETTINGS, WORKER_LOST, CLIENT_LEFT)
        for name in _METRICS:
            worker.metrics.pop(f"{NAME}_{name}", None)
        worker.metrics.pop(_BYTES_READ, None)
        _stores.pop(worker, None)


def _apply(worker: Worker, settings: Settings) -> None:
    internals.apply_interval(worker, settings.latency)
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
    server_settings.PAUSE.apply(worker, settings.pause)
    server_settings.PROFILE.apply(worker, settings.profile)
    server_settings.TICK.apply(worker, settings.tick)
