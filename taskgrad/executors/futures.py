"""Run nodes as Dask tasks: one task an action, any graph, submitted at once.

Every node that was submitted holds its future, and so keeps its value, its tape or its gradients
where they are for as long as the node itself is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from dask.base import DaskMethodsMixin
from dask.highlevelgraph import HighLevelGraph
from distributed import Future

from taskgrad.cluster import internals
from taskgrad.cluster.nested import refuse_deadlock
from taskgrad.cluster.session import Session, check_open
from taskgrad.cluster.wire import scatter
from taskgrad.errors import CotangentError, TaskgradError
from taskgrad.executors.between_steps import between_steps
from taskgrad.executors.lowering import lower, order_inputs, plain_value, resolve
from taskgrad.executors.monitor import failure, gather, wait_for
from taskgrad.graph.copies import own_copy
from taskgrad.graph.nodes import (
    BufferState,
    Call,
    CotangentCheck,
    Foreign,
    Leaf,
    Node,
    Primal,
    Pullback,
    new_key,
    versions,
)
from taskgrad.graph.pytree import plain, tensors

# Inputs from this size on go straight to their worker; smaller ones travel inside the graph.
_SCATTER_BYTES = 1 << 20
# The same for what is to be there ahead of time.
_PREFETCH_BYTES = 1 << 16

_turn = itertools.count()


class _Submission(DaskMethodsMixin):
    """A Dask collection whose persisted form is a dictionary of futures."""

    __dask_optimize__ = None

    def __init__(self, graph: HighLevelGraph, keys: list[str]) -> None:
        self._graph = graph
        self._keys = keys

    def __dask_graph__(self) -> HighLevelGraph:
        return self._graph

    def __dask_keys__(self) -> list[str]:
        return self._keys

    def __dask_postcompute__(self) -> Any:
        return list, ()

    def __dask_postpersist__(self) -> Any:
        return dict, ()


def missing(targets: Iterable[Node]) -> list[Node]:
    """The nodes that have to run for these targets, oldest first."""
    found: dict[int, Node] = {}
    stack = [resolve(t) for t in targets]
    while stack:
        node = stack.pop()
        if id(node) in found or node.result is not None:
            continue
        found[id(node)] = node
        stack.extend(order_inputs(node))
    return sorted(found.values(), key=lambda n: n.order)


def assign(nodes: Iterable[Node], session: Session) -> None:
    """Give each node without a worker the one of its first input that has one, or the next one."""
    workers: list[str] = []
    for node in nodes:
        if node.worker is not None or isinstance(node, Leaf | Foreign):
            continue
        # A backward goes to its tape, whoever made its cotangents.
        at_tape = node.call if isinstance(node, Pullback | CotangentCheck) else None
        givers = map(resolve, node.inputs) if at_tape is None else [at_tape]
        near = next((giver.worker for giver in givers if giver.worker), None)
        if near is None:
            workers = workers or [w.address for w in session.workers()]
            near = workers[next(_turn) % len(workers)]
        node.worker = near


def graph_of(node: Node, session: Session | None) -> HighLevelGraph:
    """The Dask graph of everything behind a node, for Dask's own compute and persist."""
    nodes = missing([node])
    if session is not None:
        assign(nodes, session)
    with between_steps(nodes):
        pass  # Dask submits them when it likes
    done: dict[Any, Any] = {n.key: n.result for n in _used(nodes) if n.result is not None}
    target = resolve(node)
    if target.result is not None:
        done[target.key] = target.result
    work = [n for n in nodes if not isinstance(n, Leaf) or n is target]
    names = session.names if session is not None else {}
    graph = lower(work, node.key, ordered=True, names=names)
    if done:
        graph = HighLevelGraph.merge(
            graph, HighLevelGraph({f"done-{node.key}": done}, {f"done-{node.key}": set()})
        )
    return graph


def _used(nodes: Sequence[Node]) -> Iterable[Node]:
    return (i for n in nodes for i in order_inputs(n))


def submit(targets: Sequence[Node], session: Session) -> list[Node]:
    """Submit what these targets need and has not been submitted; returns those nodes."""
    check_open(session.client)
    nodes = missing(targets)
    if not nodes:
        return []
    assign(nodes, session)
    try:
        with between_steps(nodes):
            _scatter(nodes, session, _SCATTER_BYTES)
            work = [n for n in nodes if not isinstance(n, Leaf | Primal)]
            _persist(work, work, session, ordered=False)
    except BaseException:
        forget(nodes)
        raise
    return nodes


def launch(targets: Sequence[Node], session: Session) -> None:
    """Submit these targets and all they need as one graph, of which only they are held.

    What lies between stays for as long as something in the graph needs it. Inputs of some size are
    sent to their workers at once, so that they are there when their turn comes.
    """
    check_open(session.client)
    nodes = missing(targets)
    assign(nodes, session)
    inputs = [n for n in nodes if isinstance(n, Leaf)]
    try:
        _scatter(nodes, session, _PREFETCH_BYTES)
        work = [n for n in nodes if not isinstance(n, Leaf | Primal)]
        _persist(work, targets, session, ordered=True)
    except BaseException:
        forget(targets)
        raise
    finally:
        forget(inputs)  # the graph has them now


def _persist(
    work: Sequence[Node], held: Sequence[Node], session: Session, *, ordered: bool
) -> None:
    graph = lower(work, new_key("graph"), ordered=ordered, names=session.names)
    futures: dict[str, Future] = session.client.persist(
        _Submission(graph, [n.key for n in held]), optimize_graph=False
    )
    for node in held:
        node.result = futures[node.key]


def _scatter(nodes: Sequence[Node], session: Session, least: int) -> None:
    """Send inputs of at least so many bytes straight to the workers of the calls that take them."""
    by_workers: dict[tuple[str, ...], list[Leaf]] = {}
    users: dict[Node, set[str]] = {}
    for node in nodes:
        for given in node.inputs:
            if node.worker is not None:
                users.setdefault(resolve(given), set()).add(node.worker)
    for leaf in [n for n in nodes if isinstance(n, Leaf)]:
        if sum(t.numel() * t.element_size() for t in tensors(leaf.value)) >= least:
            by_workers.setdefault(tuple(sorted(users.get(leaf, ()))), []).append(leaf)
    parts = [
        ({leaf.key: plain_value(leaf) for leaf in leaves}, list(workers))
        for workers, leaves in by_workers.items()
    ]
    sent = scatter.send(session.client, parts) if parts else {}
    for leaves in by_workers.values():
        for leaf in leaves:
            leaf.result = sent.get(leaf.key)


def forget(nodes: Iterable[Node]) -> None:
    """Let go of what these nodes hold: results, and with them tapes and gradients."""
    for node in nodes:
        node.result = None


def cancel(nodes: Sequence[Node], session: Session) -> None:
    """Have these nodes not run, whoever holds their futures: a traceback, say."""
    internals.let_go(session.client, [node.key for node in nodes])
    forget(nodes)


def run(targets: Sequence[Node], session: Session, *, wait: bool = True) -> None:
    """Submit what these targets need, and wait until all of them have run.

    Raises
    ------
    LayerError, CotangentError, TapeError
        As the worker raised it; nothing of this submission stays.
    WorkerLostError
        A worker went away with what was needed.
    """
    if wait:
        refuse_deadlock()
    nodes = submit(targets, session)
    if not wait:
        return
    try:
        error = wait_for([resolve(t) for t in targets], session)
        # Raised here, where no frame holds a future: the traceback would keep it alive.
        if error is not None:
            raise error
    except CotangentError:
        _keep_tapes(nodes)
        raise
    except BaseException:
        forget(nodes)
        forget(n.call for n in nodes if isinstance(n, Pullback))
        forget(t for t in targets if failure(t) is not None)  # submitted before, by persist
        raise


def _keep_tapes(nodes: Sequence[Node]) -> None:
    """After a wrong cotangent: forwards keep their tapes, which no backward has used."""
    for node in nodes:
        ran = isinstance(node.result, Future) and node.result.status == "finished"
        if ran or isinstance(node, Call):
            continue
        forget([node])
        if isinstance(node, Pullback):
            node.call.spent = False


def run_with_buffers(targets: Sequence[Node], session: Session, *, wait: bool = True) -> None:
    """`run`, and write buffers that modules changed (batch norm's) back into those modules."""
    states = []
    for node in missing(targets):
        if isinstance(node, Call) and node.buffers:
            node.returns_buffers = True
            states.append(BufferState(node))
    run([*targets, *states], session, wait=wait or bool(states))
    written: dict[int, tuple[Leaf, torch.Tensor]] = {}
    for state, values in zip(states, values_of(states, session), strict=True):
        for slot, value in zip(state.call.buffers, values, strict=True):
            leaf = state.call.inputs[slot]
            if value is None or not isinstance(leaf, Leaf):
                continue
            if id(leaf.value) in written:
                raise TaskgradError(
                    f"module {state.call.title!r} ran twice in one graph and changed its buffers "
                    "each time: tg.spawn runs each call from the buffers on the driver. Put the "
                    "module in a tg.GraphChain, where its state lives on the worker"
                )
            written[id(leaf.value)] = leaf, value
    for leaf, value in written.values():
        with torch.no_grad():
            leaf.value.copy_(value)
        leaf.version = versions(leaf.value)


def drop_tapes(targets: Sequence[Node]) -> None:
    """Make calls that are about to run keep no tape, but for those that a backward waits for."""
    nodes = missing(targets)
    used = {n.call for n in nodes if isinstance(n, Pullback)}
    for node in nodes:
        if isinstance(node, Call) and node not in used:
            node.drop_tape()


def values_of(targets: Sequence[Node], session: Session) -> list[Any]:
    """The values of nodes that have run, on the driver.

    Raises
    ------
    WorkerLostError
        A value was lost with its worker on the way.
    """
    nodes = [resolve(t) for t in targets]
    there = [n for n in nodes if isinstance(n.result, Future) and not isinstance(n, Leaf)]
    gathered = iter(gather(there, session))
    return [n.value if isinstance(n, Leaf) else _home(n, next(gathered)) for n in nodes]


def _home(node: Node, value: Any) -> Any:
    """A result as the driver's own, which may be written; in one process, nothing is pickled."""
    in_process = (node.worker or "").startswith("inproc:")
    return plain(own_copy(value) if in_process else value)
