"""Wait for nodes that were submitted, and notice when they can no longer come.

A task that is pinned to a worker which is gone waits in Dask for ever. So every wait of ours looks
now and then at what it waits for: what failed, what was cancelled, whose worker is gone. What a
worker kept (layers, tapes) is gone with it; a function can still run if the worker comes back under
its name within ``taskgrad.worker-deadline``. A worker that Dask paused has as long to go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distributed import Future, KilledWorker

from taskgrad.cluster import client_calls, nested
from taskgrad.cluster.config import deadline
from taskgrad.cluster.session import Session, check_open
from taskgrad.errors import TapeError, TaskgradError, WorkerLostError
from taskgrad.executors.lost import needs_layers, worker_lost, workers_killed
from taskgrad.executors.lowering import order_inputs
from taskgrad.graph.nodes import Call, Node, label_of
from taskgrad.worker.settings import settings_released

# How often a wait looks, in seconds.
_LOOK = 1.0
# How long the client may take to hand over the exception of a task that has failed, in seconds.
_ANSWER = 30


def wait_for(
    targets: Sequence[Node],
    session: Session,
    *,
    behind: Sequence[Node] = (),
    labels: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> BaseException | None:
    """Wait until all have run, or one cannot; returns the error, or None.

    A task that waits gives its worker's thread back. `behind` are nodes that the targets need and
    whose futures are not held: their workers are watched too. `labels` name, by their keys, tasks
    whose nodes are not held either. With `seconds`, a TimeoutError after that time.
    """
    with nested.waiting():
        return _wait(_Watch(targets, session, behind, labels), seconds)


def _wait(watch: _Watch, seconds: float | None) -> BaseException | None:
    client = watch.session.client
    try:
        check_open(client)
    except TaskgradError as closed:
        return closed
    end = math.inf if seconds is None else time.monotonic() + seconds
    futures = [n.result for n in watch.targets if isinstance(n.result, Future)]
    settled = client_calls.all_of(client, futures)
    try:
        while not settled.done(min(_LOOK, max(0.0, end - time.monotonic()))):
            error = watch.look()
            if error is not None:
                return error
            if time.monotonic() >= end:
                return TimeoutError(f"not done within {seconds:g} s")
    finally:
        settled.cancel()
    return watch.failed()


def gather(nodes: Sequence[Node], session: Session) -> list[Any]:
    """The values of nodes that have run.

    Raises
    ------
    WorkerLostError
        One was lost on the way.
    """
    if not nodes:
        return []
    check_open(session.client)
    workers = [n.worker or "" for n in nodes]
    coming = client_calls.values(session.client, [n.result for n in nodes], workers)
    watch = _Watch(nodes, session)
    try:
        with settings_released():
            while not coming.done(_LOOK):
                error = watch.look()
                if error is not None:
                    raise error
        found: list[Any] = coming.result()
        return found
    finally:
        coming.cancel()


def failure(node: Node) -> BaseException | None:
    """What went wrong with a node that was submitted, as an error to raise."""
    future = node.result
    if not isinstance(future, Future):
        return None
    if future.status == "error":
        error: BaseException = future.exception(timeout=_ANSWER)
        if isinstance(error, KilledWorker):
            key = str(error.task)
            return workers_killed(error, node.label if key == node.key else label_of(key))
        return error
    if future.status in ("cancelled", "lost"):
        return WorkerLostError(
            f"{node.label} was cancelled: a value that it needs was lost with its worker, or the "
            "scheduler was restarted. Make the chain and the call again"
        )
    return None


class _Watch:
    """One wait's looks at what it waits for, and since when a worker is out of order."""

    def __init__(
        self,
        targets: Sequence[Node],
        session: Session,
        behind: Sequence[Node] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.targets = targets
        self.session = session
        self._behind = behind
        self._labels = labels or {}
        self._since: dict[str, float] = {}

    def look(self) -> BaseException | None:
        """Why these will not all come, as an error to raise; None as far as is known."""
        try:
            check_open(self.session.client)
        except TaskgradError as error:
            return error
        return self.failed() or self._worker_out_of_order()

    def failed(self) -> BaseException | None:
        """Why one of the targets has failed; None if none has."""
        error = next(filter(None, map(failure, self.targets)), None)
        # A backward that Dask runs again, as its result was lost, finds no tape.
        if isinstance(error, WorkerLostError | TapeError):
            return self._lost_with_worker(self._all()) or error
        return error

    def _all(self) -> list[Node]:
        """What is waited for, and all behind it that is known."""
        found: dict[Node, None] = {}
        stack = [*self.targets, *self._behind]
        while stack:
            node = stack.pop()
            if node not in found:
                found[node] = None
                stack.extend(order_inputs(node))
        return list(found)

    def _lost_with_worker(self, nodes: Iterable[Node]) -> WorkerLostError | None:
        """The error, if one of these can only run in a process that is gone.

        What needs no layers, such as a chunk of a map, runs again if the worker was restarted.
        """
        pins = {n.worker: n for n in nodes if n.worker is not None and not _is_stateless(n)}
        staged = {n.worker for n in nodes if n.worker is not None and needs_layers(n)}
        trouble = self.session.out_of_order(set(pins))
        gone = {a for a, why in trouble.items() if why == "gone"}
        gone |= {a for a, why in trouble.items() if why == "restarted" and a in staged}
        return worker_lost(self.session, min(gone), self._all(), self._labels) if gone else None

    def _worker_out_of_order(self) -> WorkerLostError | None:
        unfinished = sorted({*_unfinished(self.targets), *self._behind}, key=lambda n: n.order)
        lost = self._lost_with_worker(unfinished)
        if lost is not None:
            return lost
        pins = {n.worker for n in unfinished if n.worker is not None}
        trouble = self.session.out_of_order(pins)
        trouble = {address: why for address, why in trouble.items() if why != "restarted"}
        now = time.monotonic()
        self._since = {address: self._since.get(address, now) for address in trouble}
        seconds = deadline("worker")
        for node in unfinished:
            if node.worker is None or node.worker not in trouble:
                continue
            gone = trouble[node.worker] == "gone"
            if now - self._since[node.worker] >= seconds:
                return WorkerLostError(
                    f"{self.session.describe(node.worker)} has been {trouble[node.worker]} for "
                    f"{seconds:g} s, and {node.label} is pinned to it. "
                    + (_START_ONE if gone else _GIVE_MEMORY)
                )
        return None


def _is_stateless(node: Node) -> bool:
    """Whether another process can run it, too: it needs no layers and no tapes."""
    return isinstance(node, Call) and node.shard is None


_START_ONE = (
    "Start a worker of that name, spawn it on another one, or raise Dask's setting "
    "taskgrad.worker-deadline"
)
_GIVE_MEMORY = (
    "Dask pauses a worker whose memory is nearly full: give the workers more memory, spread the "
    "model over more of them, or take smaller batches"
)


def _unfinished(targets: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        future = node.result
        if node in found or not isinstance(future, Future) or future.done():
            continue
        found.add(node)
        stack.extend(order_inputs(node))
    return found
