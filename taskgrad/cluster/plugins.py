"""Our store on every worker, and the sweep that empties it, as Dask plugins.

The scheduler knows when a key is forgotten: nobody holds its future, nothing waits for it, or the
client that wanted it is gone. The plugin there passes that on to the worker that ran the task; the
one on the worker releases what the store holds under the key. So nothing is left behind however a
driver ends.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import fields
from typing import Any

from distributed import Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from taskgrad.cluster import serialize as _serialize  # noqa: F401  registers the tensor family
from taskgrad.worker.sizes import Held, total_bytes
from taskgrad.worker.store import Store

NAME = "taskgrad"
# Tasks under this annotation leave something in the store of the worker that runs them.
ANNOTATION = "taskgrad"
_RELEASE = "taskgrad-release"

_stores: weakref.WeakKeyDictionary[Worker, Store] = weakref.WeakKeyDictionary()


def store_of(worker: Worker) -> Store:
    """This worker's store. A process may hold several workers, each with its own."""
    return _stores.setdefault(worker, Store(worker.address))


_METRICS = tuple(field.name for field in fields(Held))


def _held(store: Store, name: str, worker: Worker) -> int:
    """One of the metrics that go with a worker's heartbeat: bytes held."""
    return total_bytes(store.entries())[name]


class StorePlugin(WorkerPlugin):
    """Gives a worker its store and takes the scheduler's word on what to release."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Called once on each worker, those that join later too."""
        store = store_of(worker)

        def release(keys: list[str]) -> None:
            store.release(keys)

        worker.stream_handlers[_RELEASE] = release
        for name in _METRICS:  # columns of the dashboard's table of workers
            worker.metrics[f"{NAME}_{name}"] = functools.partial(_held, store, name)

    def teardown(self, worker: Worker) -> None:
        """Called when the worker closes."""
        worker.stream_handlers.pop(_RELEASE, None)
        for name in _METRICS:
            worker.metrics.pop(f"{NAME}_{name}", None)
        _stores.pop(worker, None)


class SweepPlugin(SchedulerPlugin):
    """Tells workers which of their keys are forgotten."""

    name = NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called once on the scheduler."""
        self._scheduler = scheduler
        self._ran_on: dict[str, str] = {}

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Remember who runs a key of ours; release it there when it is forgotten."""
        if finish == "processing":
            task = self._scheduler.tasks[key]
            if task.annotations and ANNOTATION in task.annotations and task.processing_on:
                self._ran_on[key] = task.processing_on.address
        elif finish == "forgotten":
            address = self._ran_on.pop(key, None)
            if address in self._scheduler.stream_comms:
                self._scheduler.worker_send(address, {"op": _RELEASE, "keys": [key]})
