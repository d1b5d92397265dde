"""Wait for nodes that were submitted, and notice when they can no longer come.

In Dask, a task that is pinned to a lost worker waits for ever. So every wait checks once a second
whether a task has failed or was cancelled, and whether a worker is lost. Layers and tapes are lost
with their worker; a function can still run if the worker comes back under its name within
``taskgrad.worker-deadline``. A worker that Dask paused has as long to resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from distributed import Future, KilledWorker

from taskgrad.cluster import client_calls, nested
from taskgrad.cluster.config import deadline
from taskgrad.cluster.session import Session, check_open
from taskgrad.cluster.wire.gather import gather_values
from taskgrad.errors import TapeError, TaskgradError, WorkerLostError
from taskgrad.executors.base import Launch, is_stateless, needs_layers
from taskgrad.executors.table import TaskTable
from taskgrad.graph.nodes import Node, label_of
from taskgrad.graph.parts import PartCall, PartView
from taskgrad.worker.settings import settings_released
from taskgrad.worker_names import WorkerName

# How often a wait checks that what it waits for can still come.
CHECK_S = 1.0
# How long the client may take to hand over the exception of a task that has failed.
_EXCEPTION_S = 30


def wait_for(
    targets: Sequence[Node],
    session: Session,
    table: TaskTable,
    launch: Launch | None,
    seconds: float | None,
) -> BaseException | None:
    """Do what `Executor.wait` says. A task that waits frees its worker's thread meanwhile."""
    with nested.waiting():
        return _wait(_Monitor(targets, session, table, launch), seconds)


def _wait(monitor: _Monitor, seconds: float | None) -> BaseException | None:
    client = monitor.session.client
    try:
        check_open(client)
    except TaskgradError as closed:
        return closed
    end = math.inf if seconds is None else time.monotonic() + seconds
    futures = [f for f in map(monitor.table.futures.get, monitor.targets) if f is not None]
    settled = client_calls.all_of(client, futures)
    try:
        while not settled.done(min(CHECK_S, max(0.0, end - time.monotonic()))):
            error = monitor.check()
            if error is not None:
                return error
            if time.monotonic() >= end:
                return TimeoutError(f"not done within {seconds:g} s")
    finally:
        settled.cancel()
    return monitor.failed()


def gather(nodes: Sequence[Node], session: Session, table: TaskTable) -> list[Any]:
    """The values of nodes that have run; WorkerLostError if one was lost on the way."""
    if not nodes:
        return []
    check_open(session.client)
    workers = [table.worker_of(n) or "" for n in nodes]
    coming = gather_values(session.client, [table.futures[n] for n in nodes], workers)
    monitor = _Monitor(nodes, session, table)
    try:
        with settings_released():
            while not coming.done(CHECK_S):
                error = monitor.check()
                if error is not None:
                    raise error
        found: list[Any] = coming.result()
        return found
    finally:
        coming.cancel()


def failure(node: Node, table: TaskTable) -> BaseException | None:
    """The error of a node that was submitted; None if it has none."""
    future = table.futures.get(node)
    return None if future is None else task_error(future, node.label)


def task_error(future: Future, label: str) -> BaseException | None:
    """The error of a task that failed or was cancelled, None if it did not."""
    if future.status == "error":
        error: BaseException = future.exception(timeout=_EXCEPTION_S)
        if isinstance(error, KilledWorker):
            key = str(error.task)
            return _workers_killed(error, label if key == str(future.key) else label_of(key))
        return error
    if future.status in ("cancelled", "lost"):
        return WorkerLostError(
            f"{label} was cancelled: a value that it needs was lost with its worker, or the "
            "scheduler was restarted. Make the chain and the call again"
        )
    return None


class Outages:
    """Since when workers have been out of order."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def lasting(self, trouble: Iterable[str]) -> set[str]:
        """Those of the workers now in trouble that were so for ``taskgrad.worker-deadline``."""
        now = time.monotonic()
        self._since = {address: self._since.get(address, now) for address in trouble}
        seconds = deadline("worker")
        return {a for a, since in self._since.items() if now - since >= seconds}


class _Monitor:
    """The state of one wait: its targets, and since when a worker is out of order."""

    def __init__(
        self,
        targets: Sequence[Node],
        session: Session,
        table: TaskTable,
        launch: Launch | None = None,
    ) -> None:
        self.targets = targets
        self.session = session
        self.table = table
        self._behind = [] if launch is None else launch.behind
        self._labels = {} if launch is None else launch.labels
        self._outages = Outages()

    def check(self) -> BaseException | None:
        """The error because of which the targets will not all come; None if none is known."""
        try:
            check_open(self.session.client)
        except TaskgradError as error:
            return error
        return self.failed() or self._worker_out_of_order()

    def failed(self) -> BaseException | None:
        """The error of a target that has failed; None if none has."""
        error = next(filter(None, (failure(t, self.table) for t in self.targets)), None)
        # A backward that Dask runs again, as its result was lost, finds no tape.
        if isinstance(error, WorkerLostError | TapeError):
            return self._lost_with_worker(self._all()) or error
        return error

    def _all(self) -> list[Node]:
        """The targets, and all behind them that is known."""
        return self.table.behind([*self.targets, *self._behind], lambda node: True)

    def _unfinished(self, node: Node) -> bool:
        future = self.table.futures.get(node)
        return future is not None and not future.done()

    def _lost_with_worker(self, nodes: Iterable[Node]) -> WorkerLostError | None:
        """The error, if one of these can only run in a process that is gone.

        What needs no layers, such as a chunk of a map, runs again if the worker was restarted.
        """
        placed = [(n, worker) for n in nodes if (worker := self.table.worker_of(n)) is not None]
        pins = {worker for n, worker in placed if not is_stateless(n)}
        staged = {worker for n, worker in placed if needs_layers(n)}
        trouble = self.session.out_of_order(pins)
        gone = {a for a, why in trouble.items() if why == "gone"}
        gone |= {a for a, why in trouble.items() if why == "restarted" and a in staged}
        if not gone:
            return None
        address, nodes = min(gone), sorted(self._all(), key=lambda n: n.order)
        known = {**self._labels, **{n.key: n.label for n in nodes}}
        undone = self.session.unfinished(address)
        again = "Call again"
        if self._labels or any(map(needs_layers, nodes)):
            again = _MAKE_AGAIN
        elif any(isinstance(node, PartCall | PartView) for node in nodes):
            again = "Make the sharded tensor again, of what is saved or on the driver,"
        tasks = [label for key, label in known.items() if key in undone]
        return worker_lost(self.session, address, tasks, again)

    def _worker_out_of_order(self) -> WorkerLostError | None:
        found = {*self.table.behind(self.targets, self._unfinished), *self._behind}
        unfinished = sorted(found, key=lambda n: n.order)
        lost = self._lost_with_worker(unfinished)
        if lost is not None:
            return lost
        placed = [(n, worker) for n in unfinished if (worker := self.table.worker_of(n))]
        trouble = self.session.out_of_order({worker for _, worker in placed})
        trouble = {address: why for address, why in trouble.items() if why != "restarted"}
        lasting = self._outages.lasting(trouble)
        for node, worker in placed:
            if worker in lasting:
                return stays_out_of_order(self.session, worker, trouble[worker], node.label)
        return None


def stays_out_of_order(session: Session, address: str, why: str, label: str) -> WorkerLostError:
    """The error for a worker that has been "gone" or "paused" for too long."""
    return WorkerLostError(
        f"{session.describe(address)} has been {why} for {deadline('worker'):g} s, and {label} is "
        "pinned to it. " + (_START_ONE if why == "gone" else _GIVE_MEMORY)
    )


_MOST_NAMED = 4  # tasks that a message names

_ENDED = (
    "If nobody stopped it, its process was killed (out of memory?), crashed, or was ended by the "
    "code that it ran (os._exit, os.abort): look at its log"
)
_MAKE_AGAIN = "Make the chain again"
_START_ONE = (
    "Start a worker of that name, spawn it on another one, or raise Dask's setting "
    "taskgrad.worker-deadline"
)
_GIVE_MEMORY = (
    "Dask pauses a worker whose memory is nearly full: give the workers more memory, spread the "
    "model over more of them, or take smaller batches"
)


def worker_lost(
    session: Session, address: str, unfinished: Sequence[str], again: str = _MAKE_AGAIN
) -> WorkerLostError:
    """The error for layers or tapes that went with their worker, with what it had not finished."""
    return WorkerLostError(
        f"{session.describe(address)} is gone, and with it the layers, tapes and parts that it "
        "kept. "
        + (f"It had not finished {_some(unfinished)}. " if unfinished else "")
        + f"{_ENDED}. {again} on the workers there are"
    )


def _workers_killed(error: KilledWorker, label: str) -> WorkerLostError:
    """The error for a task that Dask has given to several workers, each of which was lost."""
    last = error.last_worker
    return WorkerLostError(
        f"{label}: {error.allowed_failures + 1} workers ran that one after the other, and each "
        f"died; the last was worker {WorkerName(last.address, last.name)}. {_ENDED}. Dask's "
        "setting distributed.scheduler.allowed-failures says how many it may take"
    )


def _some(tasks: Sequence[str]) -> str:
    more = len(tasks) - _MOST_NAMED
    return "; ".join(tasks[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
