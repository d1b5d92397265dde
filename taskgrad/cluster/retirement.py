"""Scheduler, worker: workers that hold layers or tapes are not retired, so their state is not lost.

Before Dask retires a worker it moves its results to other workers; where it cannot, the worker
stays, is missing from what `retire_workers` returns, and a warning is logged. What our stores hold
cannot be moved at all, so workers whose store is not empty are treated like that. They go on as
before, and can be retired once the driver has released what they hold.

A worker that closes of its own accord (its ``lifetime`` is over) asks to be retired, and then
closes whatever the answer: here the answer is an error, which keeps it open. It closes as soon as
it holds nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from distributed import Scheduler, Worker
from distributed.scheduler import WorkerState

from taskgrad.cluster import internals
from taskgrad.cluster.closing import stop_answering
from taskgrad.errors import TaskgradError
from taskgrad.worker.store import Store
from taskgrad.worker_names import WorkerName

# A child of the scheduler's logger: its messages are in the scheduler's log and on the dashboard.
logger = logging.getLogger("distributed.scheduler.taskgrad")

TOPIC = "taskgrad"
"""Under which the scheduler logs an event for each worker that was not retired."""

_OCCUPIED = "taskgrad-occupied"
_HELD = "taskgrad_held"
_CLOSE = "taskgrad-close-worker"
_ANSWER_S = 10  # a worker's time to say what it holds; without its answer the log says less


class OccupancyReporter:
    """Worker: tells the scheduler when its store gets a first entry, and when it loses its last.

    Entries are made by tasks, whose messages that they are done follow this one. So when a driver
    knows of an entry, the scheduler does too.
    """

    def __init__(self, worker: Worker, store: Store) -> None:
        self._worker = worker
        self._store = store
        self._reported = False
        store.changed = self._report_later
        worker.handlers[_HELD] = store.held
        worker.stream_handlers[_CLOSE] = self._close

    def stop(self) -> None:
        """Called when the worker closes."""
        stop_answering(self._worker, _HELD)

    def _report_later(self) -> None:
        self._worker.loop.add_callback(self._report)  # from a task's thread

    def _report(self) -> None:
        occupied = not self._store.is_empty()
        if occupied != self._reported:
            self._reported = occupied
            self._worker.batched_send({"op": _OCCUPIED, "occupied": occupied})

    def _close(self) -> None:
        self._worker.loop.add_callback(
            self._worker.close_gracefully, reason="taskgrad-holds-nothing-any-more"
        )


class RetirementGuard:
    """Scheduler: which workers hold something of ours; keeps them from being retired.

    A worker holds something if its store is not empty and a key that ran there is still wanted:
    once none is, the store is being emptied. So does one that is running a task of ours.
    """

    def __init__(self, scheduler: Scheduler, is_ours: Callable[[Any], bool]) -> None:
        self._scheduler = scheduler
        self._is_ours = is_ours
        self._ran_on: dict[str, str] = {}
        self._key_counts: Counter[str] = Counter()  # of those, by worker
        self._occupied: set[str] = set()
        self._logged: set[str] = set()  # workers that were logged since they hold something
        self._closing: set[str] = set()
        scheduler.stream_handlers[_OCCUPIED] = self._set_occupied
        internals.wrap_retirement(scheduler, self._retire)

    def task_started(self, key: str, address: str) -> None:
        """A task of ours runs on this worker."""
        self.key_forgotten(key)
        self._ran_on[key] = address
        self._key_counts[address] += 1

    def key_forgotten(self, key: str) -> str | None:
        """This key is not wanted any more; returns the worker that ran it."""
        address = self._ran_on.pop(key, None)
        if address is not None:
            self._key_counts[address] -= 1
            if not self._key_counts[address]:
                del self._key_counts[address]
        return address

    def worker_removed(self, address: str) -> None:
        """This worker has left."""
        for workers in (self._occupied, self._logged, self._closing):
            workers.discard(address)

    def released(self, address: str) -> None:
        """Something of a worker's was released: if that was all, it may be retired or close."""
        if address in self._logged and not self._holds(address):
            self._logged.discard(address)
            if address in self._closing and address in self._scheduler.stream_comms:
                self._closing.discard(address)
                self._scheduler.worker_send(address, {"op": _CLOSE})

    def retirable(self, workers: list[WorkerState]) -> list[WorkerState]:
        """Those of these workers that hold nothing."""
        kept = {w.address for w in workers if self._holds(w.address)}
        self._log_later(kept - self._logged)
        return [w for w in workers if w.address not in kept]

    def _set_occupied(self, worker: str, occupied: bool) -> None:
        if occupied:
            self._occupied.add(worker)
        else:
            self._occupied.discard(worker)
            self.released(worker)

    def _holds(self, address: str) -> bool:
        if address in self._occupied and address in self._key_counts:
            return True
        worker = self._scheduler.workers.get(address)
        return worker is not None and any(map(self._is_ours, worker.processing))

    async def _retire(
        self,
        retire: Callable[..., Awaitable[dict[str, Any]]],
        workers: Collection[str] | None = None,
        *,
        names: Collection[Any] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Dask's `retire_workers` for those workers that hold nothing.

        With neither `workers` nor `names` Dask chooses, and asks our plugin whom it may.
        """
        if names is not None:
            wanted = {str(name) for name in names}
            asked = {a for a, w in self._scheduler.workers.items() if str(w.name) in wanted}
        else:
            asked = set(workers or ())
        kept = {address for address in asked if self._holds(address)}
        if not kept:
            return await retire(workers, names=names, **arguments)
        self._log_later(kept)
        if internals.is_closing_itself(arguments.get("stimulus_id")):
            self._closing |= kept
            raise TaskgradError(
                f"worker {', '.join(map(str, map(self._named, kept)))} holds layers or tapes, "
                "which cannot be moved; it stays until they are released, and then closes"
            )
        return await retire(list(asked - kept), **arguments)

    def _log_later(self, addresses: Collection[str]) -> None:
        self._logged |= set(addresses)
        if addresses:
            self._scheduler.loop.add_callback(self._log, sorted(addresses))

    def _named(self, address: str) -> WorkerName:
        worker = self._scheduler.workers.get(address)
        return WorkerName(address, None if worker is None else worker.name)

    async def _log(self, addresses: list[str]) -> None:
        message = {"op": _HELD}
        asking = self._scheduler.broadcast(msg=message, workers=addresses, on_error="ignore")
        found: dict[str, dict[str, int]] = {}
        with contextlib.suppress(TimeoutError):
            found = await asyncio.wait_for(asking, _ANSWER_S)
        for address in addresses:
            held = found.get(address, {})
            counts = ", ".join(f"{kind}: {count}" for kind, count in held.items() if count)
            logger.warning(
                "worker %s is not retired: it holds what cannot be moved (%s). It can be retired "
                "once its chains, thunks and sharded tensors are released: delete them, or make "
                "the chain on other workers (placement=...) and load its state_dict there. If the "
                "worker must go, stop it: what it holds is lost then",
                self._named(address),
                counts or "a task that is running",
            )
            event = {"action": "taskgrad-not-retired", "worker": address, **held}
            self._scheduler.log_event([TOPIC, address], event)
