"""Where a graph starts: values of the driver, of other Dask collections, and primals of a vjp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from taskgrad.errors import TaskgradError
from taskgrad.graph.copies import is_unwatched, unwatched_copy
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import carries_gradient, map_leaves, tensors


def _versions(found: Iterable[torch.Tensor]) -> list[int | None]:
    """How often each tensor was written in place; inference tensors do not count it."""
    return [None if t.is_inference() else t._version for t in found]


class Leaf(Node):
    """A value of the driver's: a pytree, which gradients reach if `needs_grad`.

    A parameter of a module that was given to `spawn` has that module as its `owner`, and its `name`
    there. A leaf that is `kept` is used after the call returns: what might be written meanwhile
    without torch's noticing is copied. A cotangent is `checked` if it is known to fit its output. A
    `key` is that of a task which has the value.
    """

    __slots__ = ("_sent", "_version", "checked", "name", "needs_grad", "owner", "value")

    needs_grad: bool

    def __init__(
        self,
        value: Any,
        *,
        needs_grad: bool | None = None,
        name: str = "",
        owner: Any = None,
        kept: bool = False,
        checked: bool = False,
        key: str = "",
    ) -> None:
        super().__init__(key or new_key("input"), None)
        self.value = value
        self.name = name
        self.owner = owner
        self.checked = checked
        found = tensors(value)
        if needs_grad is None:
            needs_grad = any(t.requires_grad for t in found)
        self.needs_grad = needs_grad and any(map(carries_gradient, found))
        self._version = _versions(found)
        self._sent = unwatched_copy(value) if kept and any(map(is_unwatched, found)) else value

    def sent(self) -> Any:
        """The value as it is sent: without autograd history.

        Raises TaskgradError if a tensor was written in place since the call that takes it was made.
        """
        if _versions(tensors(self.value)) != self._version:
            raise TaskgradError(
                "an input was modified in place after the call that it was given to was made, and "
                "before that ran: calls are lazy. Collect first, or give the call a .clone()"
            )
        return map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, self._sent)

    def write(self, value: torch.Tensor) -> None:
        """Write the value that a buffer has after a call into the leaf's tensor."""
        with torch.no_grad():
            self.value.copy_(value)
        self._version = _versions(tensors(self.value))


class External(Node):
    """A value of another Dask collection; gradients stop here."""

    __slots__ = ("collection",)

    def __init__(self, collection: Any) -> None:
        super().__init__(collection.key, None)
        self.collection = collection


class Primal(Node):
    """Another node's value, taken as an input to differentiate by: gradients stop here."""

    __slots__ = ("source",)

    def __init__(self, source: Node) -> None:
        super().__init__(new_key("input"), source.worker, [source])
        self.source = source

    @property
    def needs_grad(self) -> bool:
        return True


def resolve(node: Node) -> Node:
    """The node whose value this one's is."""
    while isinstance(node, Primal):
        node = node.source
    return node
