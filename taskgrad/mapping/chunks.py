"""Chunks of a map as nodes of the graph of calls."""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.executors.lowering import action_of
from taskgrad.graph.nodes import Leaf, Node, new_key
from taskgrad.graph.torch_settings import refuse_modes, settings_now
from taskgrad.mapping.actions import (
    GiveShared,
    GiveSharedGradient,
    GoBack,
    RunChunk,
)
from taskgrad.mapping.spec import Work


class Shared(Node):
    """What several chunks on one worker take: its leaf's value, sent there once."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Leaf, worker: str) -> None:
        super().__init__(new_key("shared"), worker)
        self.leaf = leaf

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.leaf,)


class Chunk(Node):
    """Items that run as one task; its value is a `Reply`.

    `shared` has the function's bytes and what it closes over, `items` the rows' bytes and their
    tensors. Those at `wanted` take a gradient. It is `alone` if it is the map's only one there.
    """

    __slots__ = ("alone", "items", "shared", "start", "stop", "wanted", "work")

    def __init__(
        self,
        work: Work,
        rows: range,
        shared: Node,
        items: Leaf,
        wanted: tuple[bool, ...],
        worker: str,
        alone: bool,
    ) -> None:
        refuse_modes(work.title)
        super().__init__(new_key("map", work.title), worker)
        self.settings = settings_now()
        self.work = work
        self.start, self.stop = rows.start, rows.stop
        self.shared = shared
        self.items = items
        self.wanted = wanted
        self.alone = alone

    @property
    def label(self) -> str:
        return f"items {self.start} to {self.stop - 1} of the map of {self.work.title!r}"

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.shared, self.items)


class SharedGradient(Node):
    """The sum of what eager chunks on one worker gave for what they share; None if one did not."""

    __slots__ = ("chunks",)

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(new_key("grad", chunks[0].work.title), chunks[0].worker)
        self.settings = chunks[0].settings
        self.chunks = tuple(chunks)
        self.awaits = self.chunks


class ChunksBackward(Node):
    """The backward of chunks on one worker.

    Its input are the distinct cotangents of the chunks' outputs, of which `runs` tell the order and
    `outputs` how many each chunk has. Its value are the gradients of what the chunks share, and for
    each chunk those of its items; None for one without cotangents. It uses the tapes of these
    `attempts` at the chunks and of no others.
    """

    __slots__ = ("attempts", "chunks", "cotangents", "outputs", "retain", "runs")

    def __init__(
        self,
        chunks: Sequence[Chunk],
        attempts: Sequence[str],
        outputs: Sequence[int],
        runs: Sequence[tuple[int, int]],
        cotangents: Leaf,
        retain: bool,
    ) -> None:
        refuse_modes(f"the backward of {chunks[0].work.title}")
        super().__init__(new_key("backward", chunks[0].work.title), chunks[0].worker)
        self.settings = settings_now()
        self.chunks = tuple(chunks)
        self.attempts = tuple(attempts)
        self.outputs = tuple(outputs)
        self.runs = tuple(runs)
        self.cotangents = cotangents
        self.retain = retain

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.cotangents,)


@action_of.register
def _(node: Shared) -> GiveShared:
    return GiveShared()


@action_of.register
def _(node: Chunk) -> RunChunk:
    return RunChunk(node.key, node.work, node.start, node.wanted, node.alone)


@action_of.register
def _(node: SharedGradient) -> GiveSharedGradient:
    return GiveSharedGradient(tuple(chunk.key for chunk in node.chunks))


@action_of.register
def _(node: ChunksBackward) -> GoBack:
    first = node.chunks[0].work
    keys = tuple(chunk.key for chunk in node.chunks)
    return GoBack(
        keys, node.attempts, node.outputs, node.runs, first.title, first.threads, node.retain
    )
