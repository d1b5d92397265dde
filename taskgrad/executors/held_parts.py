"""Driver: what workers keep of calls that were not Dask's tasks, for as long as a node is there.

The scheduler is told who holds what before it is made. So it is released with the client, however
that ends, and a worker that has it is not retired.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from distributed import Client

from taskgrad.cluster import internals
from taskgrad.cluster.scheduler_plugin import DROP, HOLD
from taskgrad.cluster.session import Session
from taskgrad.executors.registry import executor_of
from taskgrad.graph.nodes import Node

_held: WeakKeyDictionary[Node, weakref.finalize[..., Node]] = WeakKeyDictionary()


def hold(owner: Session, nodes: Sequence[Node]) -> None:
    """What these nodes' workers will keep under their keys stays as long as the nodes."""
    by_worker: dict[str | None, list[str]] = {}
    for node in nodes:
        by_worker.setdefault(node.worker, []).append(node.key)
        _drop_with(node, owner.client, node.key)
    for worker, keys in by_worker.items():
        internals.tell_scheduler(owner.client, {"op": HOLD, "worker": worker, "keys": keys})


def hold_as(owner: Session, node: Node, made: Node) -> None:
    """What `made` has made, as a task or not, stays as long as `node` does."""
    found = _held.pop(made, None)
    if found is None:
        executor_of(owner).hold(node, made)
        return
    found.detach()
    _drop_with(node, owner.client, made.key)


def _drop_with(node: Node, client: Client, key: str) -> None:
    found = weakref.finalize(node, _drop, weakref.ref(client), key)
    found.atexit = False
    _held[node] = found


def _drop(client: weakref.ref[Client], key: str) -> None:
    found = client()
    if found is not None:
        internals.tell_scheduler(found, {"op": DROP, "keys": [key]})
