"""Backward tasks, and reads of the gradients that they leave on workers, as nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from taskgrad.graph.calls import Call
from taskgrad.graph.nodes import Node, label_of, new_key
from taskgrad.graph.shards import Shard
from taskgrad.graph.torch_settings import refuse_modes, settings_now


class Pullback(Node):
    """One backward task: cotangents of a call's output in, cotangents of its inputs out.

    Parameters
    ----------
    call
        The forward whose tape it uses, on the worker where that is.
    cotangents
        Nodes to sum, in this order; None means ones (the output must be a scalar).
    positions
        For each cotangent the position of the element of the output that it is of; None for the
        whole output. Without this all are.
    wanted
        The input slots whose cotangents are returned.
    retain
        Keep the tape for another backward.
    carried
        (slot, cotangent): further cotangents of inputs, to which this backward adds its own.
    includes
        For parameters the gradients of newer backwards to which this one adds its own.
    scale
        The factor of a cotangent of ones: a number, and the node of another factor, if any.
    accumulate
        For each parameter whose gradient is complete with this backward, what is added to it: the
        pullbacks on this worker and the gradients from others that come before its own, in order.
    key, peers
        Where the call is a rank of a process group: the keys of this and of all ranks' pullbacks.
    awaits
        Nodes that must have run before.
    """

    __slots__ = (
        *("accumulate", "call", "carried", "cotangents", "includes", "peers", "positions"),
        *("retain", "scale", "wanted"),
    )

    def __init__(
        self,
        call: Call,
        cotangents: Sequence[Node | None],
        wanted: tuple[int, ...],
        retain: bool,
        *,
        positions: tuple[int | None, ...] = (),
        carried: tuple[tuple[int, Node], ...] = (),
        includes: Mapping[str, Sequence[Node]] | None = None,
        scale: tuple[float, Node | None] = (1.0, None),
        accumulate: Mapping[str, Sequence[Node]] | None = None,
        key: str = "",
        peers: tuple[str, ...] = (),
        awaits: tuple[Node, ...] = (),
    ) -> None:
        refuse_modes(f"the backward of {call.title}")
        self.call = call
        self.cotangents = tuple(cotangents)
        self.positions = positions or (None,) * len(self.cotangents)
        self.carried = carried
        self.includes = includes or {}
        self.wanted = wanted
        self.retain = retain
        self.scale = scale
        self.accumulate = accumulate or {}
        self.peers = peers
        found = [c for c in (*self.cotangents, scale[1]) if c is not None]
        added = (*self.includes.values(), *self.accumulate.values())
        parts = dict.fromkeys(p for parts in added for p in parts)
        key = key or new_key("backward", call.title)
        inputs = (*found, *(node for _, node in carried), *parts)
        super().__init__(key, call.worker, inputs, settings=settings_now(), awaits=awaits)

    @property
    def label(self) -> str:
        draw = self.call.spec.draw
        return label_of(self.key) + ("" if draw is None else f" in {draw}")


class WeightPullback(Pullback):
    """The gradients of the weights of a call whose backward is split, any time after its pullback.

    It completes what that pullback completes otherwise, and leaves no gradients of its own.
    """

    __slots__ = ()

    def __init__(self, pullback: Pullback) -> None:
        call = pullback.call
        key = new_key("weights", call.title)
        super().__init__(call, (), (), retain=False, key=key, awaits=(pullback,))


class CotangentCheck(Node):
    """Checks that a cotangent fits a call's output, on the worker that has the call's tape."""

    __slots__ = ("call",)

    def __init__(self, call: Call, cotangent: Node) -> None:
        super().__init__(new_key("check", call.title), call.worker, [cotangent], awaits=(call,))
        self.call = call


class Read(Node):
    """Reads something small from a worker's store; several reads on one worker can be one task."""

    __slots__ = ()


class ParameterGrad(Read):
    """The gradient of one parameter from one pullback."""

    __slots__ = ("name", "pullback")

    def __init__(self, pullback: Pullback, name: str) -> None:
        super().__init__(new_key("grad", name), pullback.worker, [pullback])
        self.pullback = pullback
        self.name = name


class TakenGrads(Node):
    """The gradients of some parameters from one pullback, as a list; its worker keeps them no more.

    They are those that the pullback does not add to the parameters' own. If they are only used on
    the same worker they `stay` on their device.
    """

    __slots__ = ("names", "pullback", "stays")

    def __init__(self, pullback: Pullback, names: Sequence[str], *, stays: bool) -> None:
        super().__init__(new_key("grads", pullback.call.title), pullback.worker, [pullback])
        self.pullback = pullback
        self.names = tuple(names)
        self.stays = stays


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
        inputs = dict.fromkeys(n for r in reads for n in r.inputs)
        super().__init__(new_key("grads"), reads[0].worker, tuple(inputs))
        self.reads = tuple(map(copy.copy, reads))  # those given are free to end before this does
