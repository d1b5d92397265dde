"""Which tasks stand for which nodes: the state of a `FuturesExecutor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Future

from taskgrad.graph.leaves import resolve
from taskgrad.graph.nodes import Element, Node, walk
from taskgrad.graph.pullback import BatchedRead, Pullback, Read

Order = Mapping[Node, Sequence[Node]]
"""For a node, others that must have run before it."""


class TaskTable:
    """By node: its future, the worker that it was given, and the batch that it is read in.

    Entries end with their nodes, and with a future's last reference Dask releases its task.
    """

    def __init__(self) -> None:
        self.futures: WeakKeyDictionary[Any, Future] = WeakKeyDictionary()
        self.workers: WeakKeyDictionary[Node, str] = WeakKeyDictionary()
        self._elements: WeakKeyDictionary[Node, Element] = WeakKeyDictionary()

    def worker_of(self, node: Node) -> str | None:
        """The worker that a node asks for, or was given; None if it has none yet."""
        return node.worker or self.workers.get(node)

    def resolve(self, node: Node) -> Node:
        """The node whose task stands for this one."""
        node = resolve(node)
        return self._elements.get(node, node) if isinstance(node, Read) else node

    def before(self, node: Node, order: Order) -> list[Node]:
        """All nodes that must have run before this one does."""
        found = [self.resolve(i) for i in (*node.inputs, *node.awaits, *order.get(node, ()))]
        if isinstance(node, Pullback):
            found.append(node.call)
        return found

    def missing(self, targets: Iterable[Node], order: Order) -> list[Node]:
        """The nodes that have to run for these targets, oldest first."""
        futures = self.futures

        def unheld(nodes: Iterable[Node]) -> list[Node]:
            return [n for n in nodes if n not in futures]

        found = walk(
            unheld(map(self.resolve, targets)), lambda node: unheld(self.before(node, order))
        )
        return sorted(found, key=lambda n: n.order)

    def behind(self, targets: Iterable[Node], only: Callable[[Node], bool]) -> list[Node]:
        """These nodes and all that must have run before them, as far as `only` holds."""
        return walk(filter(only, targets), lambda node: filter(only, self.before(node, {})))

    def batch_reads(self, targets: Sequence[Node]) -> None:
        """Make one task of those reads on one worker that have not been submitted."""
        by_worker: dict[str, list[Node]] = {}
        for node in dict.fromkeys(targets):
            single = isinstance(node, Read) and self.resolve(node) is node
            if single and node.worker and node not in self.futures:
                by_worker.setdefault(node.worker, []).append(node)
        for reads in by_worker.values():
            if len(reads) > 1:
                batch = BatchedRead(reads)
                for position, read in enumerate(reads):
                    self._elements[read] = Element(batch, position, key=read.key)

    def batch_of(self, node: Node) -> Node:
        """The node whose task returns this one's value: its batch if it has one, else the node."""
        node = self.resolve(node)
        if isinstance(node, Element) and node not in self.futures:
            return node.source if isinstance(node.source, BatchedRead) else node
        return node

    def value_from(self, batch: Node, node: Node, value: Any) -> Any:
        """A node's value, given that of its batch."""
        node = self.resolve(node)
        return value[node.position] if isinstance(node, Element) and node is not batch else value
