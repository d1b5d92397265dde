"""The protocol of executors, which run the nodes of a graph on workers and hold their results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from taskgrad.graph.calls import Call
from taskgrad.graph.nodes import Node
from taskgrad.graph.pullback import Pullback
from taskgrad.graph.shards import Shard, ShardCall


class Submitted(Node):
    """A task that was launched: its key and worker, without its inputs."""

    __slots__ = ("_label", "is_stateless", "needs_layers")

    def __init__(self, node: Node, worker: str | None) -> None:
        super().__init__(node.key, worker)
        self._label = node.label
        self.needs_layers = needs_layers(node)
        self.is_stateless = is_stateless(node)

    @property
    def label(self) -> str:
        return self._label


def needs_layers(node: Node) -> bool:
    """True if a node uses layers that its worker keeps."""
    if isinstance(node, Submitted):
        return node.needs_layers
    call = node.call if isinstance(node, Pullback) else node
    return isinstance(call, Call | ShardCall) and call.shard is not None


def is_stateless(node: Node) -> bool:
    """True if another process can run a node, too: it needs no layers and no tapes."""
    if isinstance(node, Submitted):
        return node.is_stateless
    return isinstance(node, Call) and node.shard is None


@dataclass(frozen=True)
class Launch:
    """Tasks that were launched as one graph.

    Attributes
    ----------
    targets
        The targets, in their order. Their results are held with these, not with the nodes given.
    behind
        What runs for them on workers where none of the targets does.
    labels
        The names of calls, pullbacks and shards' functions, for messages, by their keys.
    """

    targets: list[Node]
    behind: list[Node]
    labels: dict[str, str]


class Executor(Protocol):
    """Runs nodes, each at most once, where they belong.

    A node that was submitted is held: its value, its tape or its gradients stay on its worker until
    the node itself is garbage, or `forget` is called. Nodes are data and know nothing of this.
    """

    def run(self, targets: Sequence[Node], *, wait: bool = True, tapes: bool = True) -> list[Node]:
        """Submit what these targets need, and wait until all of them have run.

        Returns the nodes that were submitted. Buffers that a function's module changed are written
        back into that module. Without `tapes`, forwards keep none, but for those that a backward
        among these nodes uses.

        Raises
        ------
        LayerError, CotangentError, TapeError
            As the worker raised it; nothing of this submission stays.
        WorkerLostError
            A worker went away with what was needed.
        TaskgradError
            The client is closed; or this is a task whose worker could wait for ever.
        """

    def launch(self, targets: Sequence[Node], order: Mapping[Node, Sequence[Node]]) -> Launch:
        """Submit these targets and all they need as one graph, of which only they are held.

        Intermediate results stay for as long as something in the graph needs them. `order` has, for
        a node, others that must have run before it starts.
        """

    def wait(
        self, nodes: Sequence[Node], *, launch: Launch | None = None, seconds: float | None = None
    ) -> BaseException | None:
        """Wait until all have run, or one cannot; returns the error, or None.

        With the `launch` that they are the targets of, the workers of what runs for them are
        watched too. With `seconds`, a TimeoutError after that.
        """

    def values(self, nodes: Sequence[Node]) -> list[Any]:
        """The values of nodes that have run, on the driver.

        WorkerLostError if a value was lost with its worker on the way.
        """

    def failure(self, node: Node) -> BaseException | None:
        """The error of a node that was submitted; None if it has none."""

    def cancel(self, nodes: Sequence[Node]) -> None:
        """Cancel these nodes even if something else, such as a traceback, still refers to them."""

    def forget(self, nodes: Iterable[Node]) -> None:
        """Release what is held of these nodes: results, and with them tapes and gradients."""

    def hold(self, owner: Shard | Node, node: Node) -> None:
        """Hold the result of a node for as long as this shard or node exists on the driver."""

    def is_submitted(self, node: Node) -> bool:
        """True if a node was submitted, and is held."""

    def worker_of(self, node: Node) -> str | None:
        """The worker that a node asks for, or was given; None if it has none yet."""
