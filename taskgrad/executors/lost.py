"""The message of a WorkerLostError: the worker, its unfinished tasks, possible causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distributed import KilledWorker

from taskgrad.cluster.session import Session
from taskgrad.errors import WorkerLostError
from taskgrad.executors.base import needs_layers
from taskgrad.graph.nodes import Node

# Tasks that a message names.
_MOST_NAMED = 4

_ENDED = (
    "If nobody stopped it, its process was killed (out of memory?), crashed, or was ended by the "
    "code that it ran (os._exit, os.abort): look at its log"
)


def worker_lost(
    session: Session, address: str, nodes: Iterable[Node], labels: Mapping[str, str]
) -> WorkerLostError:
    """The error for layers or tapes that went with their worker.

    Parameters
    ----------
    session, address
        Where the worker was.
    nodes
        Those that were waited for, and all behind them.
    labels
        By their keys, the names of further tasks, whose nodes are not held any more.
    """
    nodes = list(nodes)
    known = {**labels, **{n.key: n.label for n in sorted(nodes, key=lambda n: n.order)}}
    undone = session.unfinished(address)
    again = "Make the chain again" if labels or any(map(needs_layers, nodes)) else "Call again"
    tasks = [label for key, label in known.items() if key in undone]
    return WorkerLostError(
        f"{session.describe(address)} is gone, and with it the layers and tapes that it kept. "
        + (f"It had not finished {_some(tasks)}. " if tasks else "")
        + f"{_ENDED}. {again} on the workers there are"
    )


def workers_killed(error: KilledWorker, label: str) -> WorkerLostError:
    """The error for a task that Dask has given to several workers, each of which was lost."""
    last = error.last_worker
    return WorkerLostError(
        f"{label}: {error.allowed_failures + 1} workers ran that one after the other, and each "
        f"died; the last was worker {last.name} at {last.address}. {_ENDED}. Dask's "
        "setting distributed.scheduler.allowed-failures says how many it may take"
    )


def _some(tasks: list[str]) -> str:
    more = len(tasks) - _MOST_NAMED
    return "; ".join(tasks[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
