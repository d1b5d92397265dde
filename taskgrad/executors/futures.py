"""Run nodes as Dask tasks: one task an action, any graph, submitted at once.

A table has the future of every node that was submitted, for as long as the node exists: so its
value, its tape or its gradients stay where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dask.base import DaskMethodsMixin
from dask.highlevelgraph import HighLevelGraph
from distributed import Future

from taskgrad.cluster import internals
from taskgrad.cluster.nested import refuse_deadlock
from taskgrad.cluster.session import Session, check_open
from taskgrad.cluster.wire import scatter
from taskgrad.cluster.wire.thresholds import PREFETCH_MIN, SCATTER_MIN
from taskgrad.errors import CotangentError
from taskgrad.executors.base import Launch, Submitted
from taskgrad.executors.between_steps import between_steps
from taskgrad.executors.lowering import NO_TASKS, lower
from taskgrad.executors.monitor import failure, gather, wait_for
from taskgrad.executors.table import Order, TaskTable
from taskgrad.executors.write_back import write_back
from taskgrad.graph.calls import BufferState, Call
from taskgrad.graph.copies import own_copy
from taskgrad.graph.leaves import External, Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pullback import CotangentCheck, Pullback
from taskgrad.graph.pytree import plain, tensors
from taskgrad.graph.shards import Shard, ShardCall

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


def _assign(nodes: Iterable[Node], table: TaskTable, session: Session) -> None:
    """Give each node without a worker the one of its first input that has one, or the next one."""
    workers: list[str] = []
    for node in nodes:
        if isinstance(node, Leaf | External) or table.worker_of(node):
            continue
        # A backward runs where its tape is, wherever its cotangents are made.
        at_tape = node.call if isinstance(node, Pullback | CotangentCheck) else None
        givers = map(table.resolve, node.inputs) if at_tape is None else [at_tape]
        near = next(filter(None, map(table.worker_of, givers)), None)
        if near is None:
            workers = workers or [w.address for w in session.workers()]
            near = workers[next(_turn) % len(workers)]
        table.workers[node] = near


def dask_graph(node: Node, table: TaskTable, session: Session | None) -> HighLevelGraph:
    """The Dask graph of everything behind a node; without a session no worker is assigned."""
    nodes = table.missing([node], {})
    if session is not None:
        _assign(nodes, table, session)
    with between_steps(nodes):
        pass  # Dask submits them when it likes
    target = table.resolve(node)
    used = [target, *(n for user in nodes for n in table.before(user, {}))]
    done: dict[Any, Any] = {n.key: table.futures[n] for n in used if n in table.futures}
    work = [n for n in nodes if not isinstance(n, Leaf) or n is target]
    names = session.names if session is not None else {}
    graph = lower(work, node.key, table, ordered=True, names=names)
    if done:
        graph = HighLevelGraph.merge(
            graph, HighLevelGraph({f"done-{node.key}": done}, {f"done-{node.key}": set()})
        )
    return graph


@dataclass(frozen=True)
class FuturesExecutor:
    """An `Executor` over Dask's futures. What its methods promise is described there."""

    session: Session
    table: TaskTable

    def run(self, targets: Sequence[Node], *, wait: bool = True, tapes: bool = True) -> list[Node]:
        if wait:
            refuse_deadlock()
        check_open(self.session.client)
        table = self.table
        table.batch_reads(targets)
        targets = [table.batch_of(t) for t in targets]
        nodes = table.missing(targets, {})
        states = [BufferState(n) for n in nodes if isinstance(n, Call) and n.spec.buffers]
        if states:
            refuse_deadlock()
        if not tapes:
            used = {n.call for n in nodes if isinstance(n, Pullback)}
            for node in nodes:
                if isinstance(node, Call) and node not in used:
                    node.tape.drop()
        nodes += states
        self._submit(nodes)
        if wait or states:
            self._finish([*targets, *states], nodes)
            changed = zip([state.call for state in states], self.values(states), strict=True)
            write_back(changed)
        return nodes

    def _submit(self, nodes: Sequence[Node]) -> None:
        if not nodes:
            return
        _assign(nodes, self.table, self.session)
        try:
            with between_steps(nodes):
                self._scatter(nodes, SCATTER_MIN)
                work = [n for n in nodes if not isinstance(n, NO_TASKS)]
                futures = self._persist(work, work, {}, ordered=False)
                self.table.futures.update(zip(work, futures, strict=True))
        except BaseException:
            self.forget(nodes)
            raise

    def _finish(self, targets: Sequence[Node], nodes: Sequence[Node]) -> None:
        """Wait for these targets, for which these nodes were submitted."""
        try:
            error = self.wait(targets)
            # Raised here, where no frame holds a future: the traceback would keep it alive.
            if error is not None:
                raise error
        except CotangentError:
            self._keep_tapes(nodes)
            raise
        except BaseException:
            self.forget(nodes)
            self.forget(n.call for n in nodes if isinstance(n, Pullback))
            # Submitted before, by persist:
            self.forget(t for t in targets if self.failure(t) is not None)
            raise

    def _keep_tapes(self, nodes: Sequence[Node]) -> None:
        """After a wrong cotangent: forwards keep their tapes, which no backward has used."""
        for node in nodes:
            future = self.table.futures.get(node)
            if isinstance(node, Call) or (future is not None and future.status == "finished"):
                continue
            self.forget([node])
            if isinstance(node, Pullback):
                node.call.tape.restore()

    def launch(self, targets: Sequence[Node], order: Order) -> Launch:
        check_open(self.session.client)
        table = self.table
        nodes = table.missing(targets, order)
        _assign(nodes, table, self.session)
        try:
            self._scatter(nodes, PREFETCH_MIN)
            work = [n for n in nodes if not isinstance(n, NO_TASKS)]
            futures = self._persist(work, targets, order, ordered=True)
        finally:
            self.forget(n for n in nodes if isinstance(n, Leaf))  # the graph has them now
        held = [Submitted(t, table.worker_of(t)) for t in targets]
        for task, future in zip(held, futures, strict=True):
            table.futures[task] = future
        workers = {None, *(task.worker for task in held)}
        placed = [(node, table.worker_of(node)) for node in work]
        return Launch(
            list(held),
            [Submitted(node, worker) for node, worker in placed if worker not in workers],
            {n.key: n.label for n in nodes if isinstance(n, Call | Pullback | ShardCall)},
        )

    def _persist(
        self, work: Sequence[Node], held: Sequence[Node], order: Order, *, ordered: bool
    ) -> list[Future]:
        """Submit these nodes; the futures of those to be held."""
        names = self.session.names
        graph = lower(work, new_key("graph"), self.table, order, ordered=ordered, names=names)
        keys = [n.key for n in held]
        futures = self.session.client.persist(_Submission(graph, keys), optimize_graph=False)
        return [futures[key] for key in keys]

    def _scatter(self, nodes: Sequence[Node], least: int) -> None:
        """Send inputs of at least `least` bytes to the workers of the calls that take them."""
        by_workers: dict[tuple[str, ...], list[Leaf]] = {}
        users: dict[Node, set[str]] = {}
        for node in nodes:
            worker = self.table.worker_of(node)
            if worker is not None:
                for given in node.inputs:
                    users.setdefault(self.table.resolve(given), set()).add(worker)
        for leaf in [n for n in nodes if isinstance(n, Leaf)]:
            if sum(t.numel() * t.element_size() for t in tensors(leaf.value)) >= least:
                by_workers.setdefault(tuple(sorted(users.get(leaf, ()))), []).append(leaf)
        parts = [
            ({leaf.key: leaf.sent() for leaf in leaves}, list(workers))
            for workers, leaves in by_workers.items()
        ]
        sent = scatter.send(self.session.client, parts) if parts else {}
        for leaves in by_workers.values():
            for leaf in leaves:
                if leaf.key in sent:
                    self.table.futures[leaf] = sent[leaf.key]

    def wait(
        self, nodes: Sequence[Node], *, launch: Launch | None = None, seconds: float | None = None
    ) -> BaseException | None:
        targets = [self.table.batch_of(n) for n in nodes]
        return wait_for(targets, self.session, self.table, launch, seconds)

    def values(self, nodes: Sequence[Node]) -> list[Any]:
        table = self.table
        batches = [table.batch_of(n) for n in nodes]
        there = [n for n in dict.fromkeys(batches) if not isinstance(n, Leaf)]
        found = dict(zip(there, gather(there, self.session, table), strict=True))
        return [
            c.value if isinstance(c, Leaf) else self._own(c, table.value_from(c, n, found[c]))
            for n, c in zip(nodes, batches, strict=True)
        ]

    def _own(self, node: Node, value: Any) -> Any:
        """A result that the driver may write; within one process nothing was pickled."""
        in_process = (self.worker_of(node) or "").startswith("inproc:")
        return plain(own_copy(value) if in_process else value)

    def failure(self, node: Node) -> BaseException | None:
        return failure(node, self.table)

    def cancel(self, nodes: Sequence[Node]) -> None:
        internals.release(self.session.client, [node.key for node in nodes])
        self.forget(nodes)

    def forget(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self.table.futures.pop(node, None)

    def hold(self, owner: Shard | Node, node: Node) -> None:
        self.table.futures[owner] = self.table.futures[node]

    def is_submitted(self, node: Node) -> bool:
        return self.table.resolve(node) in self.table.futures

    def worker_of(self, node: Node) -> str | None:
        return self.table.worker_of(node)
