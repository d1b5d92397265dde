"""Nodes that read something small from a worker's store. Many of them can be one task."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pullback import Pullback
from taskgrad.graph.shards import Shard


class Read(Node):
    """Reads something small from a worker's store; several reads on one worker can be one task."""

    __slots__ = ()


class ParameterGrad(Read):
    """The gradient of one parameter from one pullback."""

    __slots__ = ("name", "pullback")

    def __init__(self, pullback: Pullback, name: str) -> None:
        super().__init__(new_key("grad", name), pullback.worker)
        self.pullback = pullback
        self.name = name

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.pullback,)


class StoredGrad(Read):
    """The gradient that has been accumulated for one parameter of a shard."""

    __slots__ = ("name", "shard")

    def __init__(self, shard: Shard, name: str) -> None:
        super().__init__(new_key("grad", name), shard.worker)
        self.shard = shard
        self.name = name


class BatchedRead(Node):
    """Several reads on one worker as one task, whose result is the list of theirs."""

    __slots__ = ("reads",)

    def __init__(self, reads: Sequence[Node]) -> None:
        super().__init__(new_key("grads"), reads[0].worker)
        self.reads = tuple(map(copy.copy, reads))  # those given are free to end before this does

    @property
    def inputs(self) -> Sequence[Node]:
        return tuple(dict.fromkeys(n for r in self.reads for n in r.inputs))
