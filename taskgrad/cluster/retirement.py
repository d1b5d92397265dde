"""A worker that holds layers or tapes is not retired: nothing of ours is lost without a word.

Before Dask retires a worker it moves the results there to other workers; where it cannot, the
worker stays, is missing from what `retire_workers` returns, and the log says so. What our stores
hold cannot be moved at all, so workers with something in theirs are treated in that way. They go on
as before, and can be retired once the driver has let go of what they hold.

A worker that wants to leave of its own accord (its ``lifetime`` is over) asks to be retired, and
then closes whatever the answer: here the answer is an error, which keeps it open. It leaves as soon
as it holds nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from distributed import Scheduler, Worker
from distributed.scheduler import WorkerState

from taskgrad.cluster import internals
from taskgrad.errors import TaskgradError
from taskgrad.worker.store import Store

# Below the scheduler's own, so that what it is told stands in the scheduler's log and dashboard.
logger = logging.getLogger("distributed.scheduler.taskgrad")

TOPIC = "taskgrad"
"""Under which the scheduler logs an event for each worker that was not retired."""

_FILLED = "taskgrad-filled"
_HELD = "taskgrad_held"
_LEAVE = "taskgrad-leave"

# Seconds that a worker may take to say what it holds; without its answer the log says less.
_ANSWER = 10


class Reporter:
    """Tells the scheduler when a worker's store gets its first entry and when it loses its last.

    Whoever puts something there is a task, and its message that it is done comes after this one: a
    driver that knows of an entry can rely on the scheduler to know of it.
    """

    def __init__(self, worker: Worker, store: Store) -> None:
        self._worker = worker
        self._store = store
        self._said = False
        store.changed = self._later
        worker.handlers[_HELD] = self._held
        worker.stream_handlers[_LEAVE] = self._leave

    def stop(self) -> None:
        """The worker closes."""
        self._worker.handlers.pop(_HELD, None)

    def _later(self) -> None:
        self._worker.loop.add_callback(self._report)  # from a task's thread

    def _report(self) -> None:
        filled = not self._store.is_empty()
        if filled != self._said:
            self._said = filled
            self._worker.batched_send({"op": _FILLED, "filled": filled})

    def _held(self) -> dict[str, int]:
        return self._store.held()

    def _leave(self) -> None:
        self._worker.loop.add_callback(
            self._worker.close_gracefully, reason="taskgrad-holds-nothing-any-more"
        )


class Holders:
    """Which workers hold something of ours, and the guard that keeps them; on the scheduler.

    A worker holds something if its store is not empty, and a key of those that ran there is still
    wanted: once it is not, the store is being emptied. So does one that is running a task of ours.
    """

    def __init__(self, scheduler: Scheduler, is_ours: Callable[[Any], bool]) -> None:
        self._scheduler = scheduler
        self._is_ours = is_ours
        self._ran_on: dict[str, str] = {}
        self._keys: Counter[str] = Counter()  # how many of those, by worker
        self._filled: set[str] = set()
        self._told: set[str] = set()  # of which workers the log has told since they hold something
        self._leaving: set[str] = set()
        scheduler.stream_handlers[_FILLED] = self._fill
        internals.wrap_retirement(scheduler, self._retire)

    def ran(self, key: str, address: str) -> None:
        """A task of ours is running there."""
        self.forget(key)
        self._ran_on[key] = address
        self._keys[address] += 1

    def forget(self, key: str) -> str | None:
        """This key is not wanted any more; gives the worker that ran it."""
        address = self._ran_on.pop(key, None)
        if address is not None:
            self._keys[address] -= 1
            if not self._keys[address]:
                del self._keys[address]
        return address

    def gone(self, address: str) -> None:
        """This worker has left."""
        for workers in (self._filled, self._told, self._leaving):
            workers.discard(address)

    def look(self, address: str) -> None:
        """Something of a worker's has gone: it may hold nothing now."""
        if address in self._told and not self._holds(address):
            self._told.discard(address)
            if address in self._leaving and address in self._scheduler.stream_comms:
                self._leaving.discard(address)
                self._scheduler.worker_send(address, {"op": _LEAVE})

    def without(self, workers: list[WorkerState]) -> list[WorkerState]:
        """Those of these workers that hold nothing."""
        kept = {w.address for w in workers if self._holds(w.address)}
        self._tell(kept - self._told)
        return [w for w in workers if w.address not in kept]

    def _fill(self, worker: str, filled: bool) -> None:
        if filled:
            self._filled.add(worker)
        else:
            self._filled.discard(worker)
            self.look(worker)

    def _holds(self, address: str) -> bool:
        if address in self._filled and address in self._keys:
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
        self._tell(kept)
        if internals.is_closing_itself(arguments.get("stimulus_id")):
            self._leaving |= kept
            raise TaskgradError(
                f"worker {', '.join(kept)} holds layers or tapes, which cannot be moved; it stays "
                "until they are let go of, and then closes"
            )
        return await retire(list(asked - kept), **arguments)

    def _tell(self, addresses: Collection[str]) -> None:
        self._told |= set(addresses)
        if addresses:
            self._scheduler.loop.add_callback(self._tell_now, sorted(addresses))

    async def _tell_now(self, addresses: list[str]) -> None:
        for address, held in (await self._what_is_held(addresses)).items():
            counts = ", ".join(f"{kind}: {count}" for kind, count in held.items() if count)
            logger.warning(
                "worker %s is not retired: it holds what cannot be moved (%s). It can be retired "
                "once its chains and thunks are let go of: delete them, or make the chain on other "
                "workers (placement=...) and load its state_dict there. If the worker must go, "
                "stop it: what it holds is lost then",
                address,
                counts or "a task that is running",
            )
            event = {"action": "taskgrad-not-retired", "worker": address, **held}
            self._scheduler.log_event([TOPIC, address], event)

    async def _what_is_held(self, addresses: list[str]) -> dict[str, dict[str, int]]:
        message = {"op": _HELD}
        asking = self._scheduler.broadcast(msg=message, workers=addresses, on_error="ignore")
        try:
            found: dict[str, dict[str, int]] = await asyncio.wait_for(asking, _ANSWER)
        except TimeoutError:
            found = {}
        return {address: found.get(address, {}) for address in addresses}
