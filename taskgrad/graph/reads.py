"""Nodes that read something small where it lies, of which many can be one task."""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.graph.nodes import Node, Pullback, Shard, new_key


class Read(Node):
    """Reads something small from a worker's store; several reads on one worker can be one task.

    `part_of` is then that task and the position of this read in it.
    """

    __slots__ = ("part_of",)

    def __init__(self, key: str, worker: str | None) -> None:
        super().__init__(key, worker)
        self.part_of: tuple[Bundle, int] | None = None

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.part_of[0],) if self.part_of else self.after

    @property
    def after(self) -> Sequence[Node]:
        """What must have run before there is something to read."""
        return ()

    def again(self) -> Read:
        """The same read, as another node."""
        raise NotImplementedError


class ParameterGrad(Read):
    """The gradient of one parameter from one pullback."""

    __slots__ = ("name", "pullback")

    def __init__(self, pullback: Pullback, name: str) -> None:
        super().__init__(new_key("grad", name), pullback.worker)
        self.pullback = pullback
        self.name = name

    @property
    def after(self) -> Sequence[Node]:
        return (self.pullback,)

    def again(self) -> Read:
        return ParameterGrad(self.pullback, self.name)


class StoredGrad(Read):
    """The gradient that has been accumulated for one parameter of a shard."""

    __slots__ = ("name", "shard")

    def __init__(self, shard: Shard, name: str) -> None:
        super().__init__(new_key("grad", name), shard.worker)
        self.shard = shard
        self.name = name

    def again(self) -> Read:
        return StoredGrad(self.shard, self.name)


class Bundle(Node):
    """Several reads on one worker as one task, whose result is the list of theirs."""

    __slots__ = ("reads",)

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__(new_key("grads"), reads[0].worker)
        # The same reads as new nodes: those given will hold this bundle.
        self.reads = tuple(r.again() for r in reads)

    @property
    def inputs(self) -> Sequence[Node]:
        return tuple(dict.fromkeys(n for r in self.reads for n in r.after))
