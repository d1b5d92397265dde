"""Wait for nodes that were submitted, and notice when they can no longer come.

A task that is pinned to a worker which is gone waits in Dask for ever. So every wait of ours looks
now and then at what it waits for: what failed, what was cancelled, whose worker is gone. What a
worker kept (layers, tapes) is gone with it; a function can still run if the worker comes back under
its name within ``taskgrad.worker-deadline``. A worker that Dask paused has as long to go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from distributed import Future, KilledWorker

from taskgrad.cluster import nested, waiting
from taskgrad.cluster.config import deadline
from taskgrad.cluster.session import Session, check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.lowering import order_inputs
from taskgrad.graph.nodes import Call, Node
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
    seconds: float | None = None,
) -> BaseException | None:
    """Wait until all have run, or one cannot; returns the error, or None.

    A task that waits gives its worker's thread back. `behind` are nodes that the targets need and
    whose futures are not held: their workers are watched too. With `seconds`, a TimeoutError after
    that time.
    """
    with nested.waiting():
        return _wait(targets, session, behind, seconds)


def _wait(
    targets: Sequence[Node], session: Session, behind: Sequence[Node], seconds: float | None
) -> BaseException | None:
    try:
        check_open(session.client)
    except TaskgradError as closed:
        return closed
    end = math.inf if seconds is None else time.monotonic() + seconds
    futures = [n.result for n in targets if isinstance(n.result, Future)]
    settled = waiting.all_of(session.client, futures)
    watch = _Watch(targets, session, behind)
    try:
        while not settled.done(min(_LOOK, max(0.0, end - time.monotonic()))):
            error = watch.look()
            if error is not None:
                return error
            if time.monotonic() >= end:
                return TimeoutError(f"not done within {seconds:g} s")
    finally:
        settled.cancel()
    return next(filter(None, map(failure, targets)), None)


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
    coming = waiting.values(session.client, [n.result for n in nodes], workers)
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
            return WorkerLostError(
                f"{error}. The worker died while it ran this task; look at its log (memory?), "
                "then make the chain again"
            )
        return error
    if future.status in ("cancelled", "lost"):
        return WorkerLostError(
            f"{_name(node)} was cancelled: a value that it needs was lost with its worker, or the "
            "scheduler was restarted. Make the chain and the call again"
        )
    return None


class _Watch:
    """One wait's looks at what it waits for, and since when a worker is out of order."""

    def __init__(
        self, targets: Sequence[Node], session: Session, behind: Sequence[Node] = ()
    ) -> None:
        self._targets = targets
        self._behind = behind
        self._session = session
        self._since: dict[str, float] = {}

    def look(self) -> BaseException | None:
        """Why these will not all come, as an error to raise; None as far as is known."""
        try:
            check_open(self._session.client)
        except TaskgradError as error:
            return error
        failed = next(filter(None, map(failure, self._targets)), None)
        return failed or self._worker_out_of_order()

    def _worker_out_of_order(self) -> WorkerLostError | None:
        unfinished = sorted({*_unfinished(self._targets), *self._behind}, key=lambda n: n.order)
        pins = {n.worker for n in unfinished if n.worker is not None}
        trouble = self._session.out_of_order(pins)
        now = time.monotonic()
        self._since = {address: self._since.get(address, now) for address in trouble}
        seconds = deadline("worker")
        for node in unfinished:
            if node.worker is None or node.worker not in trouble:
                continue
            gone = trouble[node.worker] == "gone"
            stateless = isinstance(node, Call) and node.stage is None
            if gone and not stateless:
                return WorkerLostError(
                    f"{self._describe(node.worker)} is gone, and {_name(node)} can only run there: "
                    "its layers or tapes are lost. Make the chain again on the workers there are"
                )
            if now - self._since[node.worker] >= seconds:
                return WorkerLostError(
                    f"{self._describe(node.worker)} has been {trouble[node.worker]} for "
                    f"{seconds:g} s, and {_name(node)} is pinned to it. "
                    + (_START_ONE if gone else _GIVE_MEMORY)
                )
        return None

    def _describe(self, address: str) -> str:
        name = self._session.names.get(address, address)
        return f"worker {name} at {address}" if name != address else f"worker {name}"


_START_ONE = (
    "Start a worker of that name, spawn it on another one, or raise Dask's setting "
    "taskgrad.worker-deadline"
)
_GIVE_MEMORY = (
    "Dask pauses a worker whose memory is nearly full: give the workers more memory, spread the "
    "model over more of them, or take smaller batches"
)


def _name(node: Node) -> str:
    return repr(node.key.partition("-")[0])


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
