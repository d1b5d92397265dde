"""The graph of calls, as data: a `Node` is one value that is not computed yet.

It knows the nodes whose values it takes and the worker that it has to run on. An executor turns
nodes into tasks and keeps their results; nodes themselves do not change once they are made.
Nodes that compute have the `settings` of torch with which they are to run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from taskgrad.graph.objects import Opaque
from taskgrad.graph.torch_settings import TorchSettings, settings_now

T = TypeVar("T")

_order = itertools.count(1)


def new_key(action: str, name: str = "") -> str:
    """A task key whose prefix, as the dashboard cuts it, is the action and the layer's name."""
    label = f"{action}:{name}" if name else action
    return f"{label.replace('-', '_').replace(' ', '_')}-{os.urandom(16).hex()}"


def label_of(key: str) -> str:
    """A task, for a message: the prefix of its key."""
    return repr(key.partition("-")[0])


class Node(Opaque):
    """One value of the graph. `order` rises with creation, so inputs come before users.

    `worker` is the address of the worker to run on; with None the executor chooses one. `inputs`
    are the nodes whose values this one takes, in order; `awaits` are nodes that must have run
    before, though it takes no value of theirs.
    """

    __slots__ = ("__weakref__", "awaits", "inputs", "key", "order", "settings", "worker")

    def __init__(
        self,
        key: str,
        worker: str | None,
        inputs: Sequence[Node] = (),
        *,
        settings: TorchSettings | None = None,
        awaits: tuple[Node, ...] = (),
    ) -> None:
        self.key = key
        self.worker = worker
        self.inputs = tuple(inputs)
        self.settings = settings
        self.awaits = awaits
        self.order = next(_order)

    @property
    def label(self) -> str:
        """The task, for a message."""
        return label_of(self.key)

    @property
    def needs_grad(self) -> bool:
        """True if anything upstream can receive a gradient from this value."""
        return False


class Element(Node):
    """One element of another node's value, which is a sequence.

    A gradient can reach it only if it `carries_gradient`.
    """

    __slots__ = ("carries_gradient", "position", "source")

    def __init__(
        self, source: Node, position: int, *, key: str, carries_gradient: bool = False
    ) -> None:
        super().__init__(key, source.worker, [source])
        self.source = source
        self.position = position
        self.carries_gradient = carries_gradient

    @property
    def needs_grad(self) -> bool:
        return self.carries_gradient and self.source.needs_grad


class Sum(Node):
    """Cotangents of one value added up, in order; None counts as zero."""

    __slots__ = ()

    def __init__(self, parts: Sequence[Node], name: str, worker: str | None) -> None:
        super().__init__(new_key("sum", name), worker, parts, settings=settings_now())


def sum_of(parts: Sequence[Node], name: str, worker: str | None = None) -> Node | None:
    """One node for cotangents that are to be summed; None if there are none."""
    if len(parts) > 1:
        return Sum(parts, name, worker or parts[0].worker)
    return parts[0] if parts else None


def whole(node: Node) -> Node:
    """The node that an element is of; any other node itself."""
    return node.source if isinstance(node, Element) else node


def walk(starts: Iterable[T], onward: Callable[[T], Iterable[T]]) -> list[T]:
    """Each node that can be reached from these, once, users before inputs of one path."""
    found: dict[T, None] = {}
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack.extend(onward(node))
    return list(found)


def ancestors(outputs: Iterable[Node]) -> list[Node]:
    """These nodes and all that they need."""
    return walk(outputs, lambda node: node.inputs)
