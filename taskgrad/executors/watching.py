"""Wait for nodes that were submitted, and notice when they can no longer come.

A task that is pinned to a worker which is gone waits in Dask for ever. So every wait of ours looks
now and then at what it waits for: what failed, what was cancelled, whose worker is gone. What a
worker kept (layers, tapes) is gone with it; a function can still run if the worker comes back under
its name within ``taskgrad.worker-deadline``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Future, KilledWorker

from taskgrad.cluster import config as _config  # noqa: F401  sets the defaults
from taskgrad.cluster import waiting
from taskgrad.cluster.session import Session, check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.lowering import order_inputs
from taskgrad.graph.nodes import Call, Node

# How often a wait looks, in seconds.
_LOOK = 1.0
# How long the client may take to hand over the exception of a task that has failed, in seconds.
_ANSWER = 30


def wait_for(targets: Sequence[Node], session: Session) -> BaseException | None:
    """Wait until all have run, or one cannot; returns the error, or None."""
    futures = [n.result for n in targets if isinstance(n.result, Future)]
    settled = waiting.all_of(session.client, futures)
    watch = _Watch(targets, session)
    try:
        while not settled.done(_LOOK):
            error = watch.look()
            if error is not None:
                return error
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
    coming = waiting.values(session.client, [n.result for n in nodes])
    watch = _Watch(nodes, session)
    try:
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
    """One wait's looks at what it waits for, and since when a worker is missing."""

    def __init__(self, targets: Sequence[Node], session: Session) -> None:
        self._targets = targets
        self._session = session
        self._missing_since: dict[str, float] = {}

    def look(self) -> BaseException | None:
        """Why these will not all come, as an error to raise; None as far as is known."""
        try:
            check_open(self._session.client)
        except TaskgradError as error:
            return error
        failed = next(filter(None, map(failure, self._targets)), None)
        return failed or self._lost_worker()

    def _lost_worker(self) -> WorkerLostError | None:
        now, seen = time.monotonic(), dict(self._missing_since)
        self._missing_since.clear()
        unfinished = sorted(_unfinished(self._targets), key=lambda n: n.order)
        gone = self._session.gone({n.worker for n in unfinished if n.worker is not None})
        for node in unfinished:
            if node.worker not in gone:
                continue
            name = self._session.names.get(node.worker, node.worker)
            worker = f"worker {name} at {node.worker}" if name != node.worker else f"worker {name}"
            if not (isinstance(node, Call) and node.stage is None):
                return WorkerLostError(
                    f"{worker} is gone, and {_name(node)} can only run there: its layers or tapes "
                    "are lost. Make the chain again on the workers there are"
                )
            since = self._missing_since.setdefault(node.worker, seen.get(node.worker, now))
            deadline = parse_timedelta(dask.config.get("taskgrad.worker-deadline"))
            if now - since >= deadline:
                return WorkerLostError(
                    f"{worker} has been gone for {deadline:g} s, and {_name(node)} is pinned to "
                    "it. Start a worker of that name, spawn it on another one, or raise Dask's "
                    "setting taskgrad.worker-deadline"
                )
        return None


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
