"""Calls: one forward task each, of layers of a shard in a row, or of one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from taskgrad.graph.mesh import Mesh
from taskgrad.graph.nodes import Node, label_of, new_key
from taskgrad.graph.shards import Shard
from taskgrad.graph.torch_settings import TorchSettings, refuse_modes, settings_now
from taskgrad.worker_names import WorkerName

LOSS = -1
"""The index of the loss among the steps of a call, where layers have theirs."""

LayerStep = tuple[int, str, str]
"""(index, name, kind) of a layer or function, as one step of a call."""


class Draw(NamedTuple):
    """What random numbers are drawn for: this microbatch of this training step."""

    seed: int
    step: int
    microbatch: int

    def __str__(self) -> str:
        return f"microbatch {self.microbatch} of step {self.step}"


class LossSpec(NamedTuple):
    """How the loss is computed in the last call of a microbatch.

    `template` are its pickled arguments after the output; with `check_finite` it is an error if it
    is not a finite number. `weight` is the slot of its weight, where that is a value of the step: a
    loss of weight 0 may be anything.
    """

    template: bytes
    check_finite: bool
    weight: int | None = None


class StepContext(NamedTuple):
    """What a training step adds to a call.

    `draw` are the streams that layers draw from; `recompute` the (start, stop) of those steps that
    keep only their input and run again in the backward; `loss` is there if the last step is one.
    With `split`, the gradients of weights are computed by a task of their own (`WeightPullback`).
    Where replicas take microbatches at once, and exchange values in that, the call is the `rank` of
    a process group, and `peers` are the keys of the calls of all ranks.
    """

    draw: Draw
    recompute: tuple[tuple[int, int], ...] = ()
    loss: LossSpec | None = None
    split: bool = False
    rank: Rank | None = None
    peers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """What the calls of one function that run at once and exchange values have in common.

    It is sent with each of them; on the driver its identity groups them, forward and backward.

    Attributes
    ----------
    title
        The function's name, for messages.
    mesh
        The mapped axes.
    workers
        Each rank's worker, in rank order.
    seed
        What the ranks' random streams start from.
    deadline
        Seconds for which a rank waits for another one.
    client
        The id of the client that may have linked the workers for messages of its ranks.
    """

    title: str
    mesh: Mesh
    workers: tuple[WorkerName, ...]
    seed: int
    deadline: float
    client: str = ""


@dataclass(frozen=True)
class Rank:
    """One call of a process group, by its place in it."""

    group: ProcessGroup
    index: int

    def __str__(self) -> str:
        place = self.group.mesh.described(self.index)
        return f"rank {self.index}{place} of {self.group.title}"


class CallSpec(NamedTuple):
    """What a worker is told of a call: plain data, which is sent as it is.

    Attributes
    ----------
    key
        The call's own, under which its tape is stored.
    title
        The name of the function or of the layers, for messages.
    steps
        Layers that run one after the other; for a function one step.
    shard
        The token of the shard that has the layers; None for a function.
    function
        The packed function; its tensors are inputs, at the slots `tensor_slots`.
    template
        Pickled (args, kwargs) of the first step, with a `Slot` for each input.
    segment
        The packed `Segment` of a stage of a model's graph, whose steps have arguments of their own;
        else empty.
    mode
        True: the layers train, False: they evaluate, None: as they are.
    needs_grad
        For each input slot, whether something upstream takes a gradient.
    buffers
        The slots that hold buffers of a function's module.
    rank, peers
        If it is one rank of a process group: which, and the keys of the calls of all ranks.
    raw
        The function takes its inputs as they came: it copies what it writes, and makes its own
        leaves of autograd.
    context
        What a training step adds; None outside of one.
    """

    key: str
    title: str
    steps: tuple[LayerStep, ...]
    shard: str | None
    function: bytes
    tensor_slots: tuple[int, ...]
    template: bytes
    segment: bytes
    mode: bool | None
    needs_grad: tuple[bool, ...]
    buffers: tuple[int, ...]
    rank: Rank | None
    peers: tuple[str, ...]
    raw: bool
    context: StepContext | None

    @property
    def draw(self) -> Draw | None:
        """The streams that layers draw from in a training step."""
        return None if self.context is None else self.context.draw


class TapeUse:
    """The state of a call's tape, as the driver knows it.

    `wanted` says whether a gradient could go through the call, `kept` whether the call leaves a
    tape for that, `spent` whether that was used. `claims` counts the autograd functions on the
    driver that have yet to use it.
    """

    __slots__ = ("claims", "kept", "spent", "wanted")

    def __init__(self, wanted: bool, grad: bool) -> None:
        self.wanted = wanted
        self.kept = wanted and grad
        self.spent = False
        self.claims = 0

    def drop(self) -> None:
        """The call is about to run, and shall leave no tape."""
        self.kept = False

    def spend(self) -> None:
        """A backward uses the tape up."""
        self.spent = True

    def restore(self) -> None:
        """That backward ended before it used the tape."""
        self.spent = False

    def claim(self) -> None:
        """One more autograd function is to use the tape."""
        self.claims += 1

    def unclaim(self) -> None:
        """One of them will not use it any more."""
        self.claims -= 1


class Call(Node):
    """One forward task.

    `parameters` are the names of the trainable parameters that its layers use. It is not
    `differentiable` if no gradient can reach what it gives, whatever it is given. Without
    `settings` torch's are read now. For the rest see `CallSpec`.
    """

    __slots__ = ("parameters", "shard", "spec", "tape")

    def __init__(
        self,
        *,
        title: str,
        steps: tuple[LayerStep, ...],
        inputs: Sequence[Node],
        template: bytes,
        segment: bytes = b"",
        shard: Shard | None = None,
        function: bytes = b"",
        tensor_slots: tuple[int, ...] = (),
        parameters: tuple[str, ...] = (),
        differentiable: bool = True,
        buffers: tuple[int, ...] = (),
        mode: bool | None = None,
        worker: str | None = None,
        key: str = "",
        rank: Rank | None = None,
        peers: tuple[str, ...] = (),
        raw: bool = False,
        context: StepContext | None = None,
        settings: TorchSettings | None = None,
    ) -> None:
        if settings is None:
            refuse_modes(title)
            settings = settings_now()
        if context is not None and context.rank is not None:
            rank, peers = context.rank, context.peers
            key = peers[rank.index]
            context = context._replace(rank=None, peers=())
        key = key or new_key("forward", title)
        super().__init__(key, worker, inputs, settings=settings)
        needs_grad = tuple([i.needs_grad for i in inputs])
        self.shard = shard
        self.parameters = parameters
        wanted = differentiable and (bool(parameters) or True in needs_grad)
        self.tape = TapeUse(wanted, settings.grad)
        self.spec = CallSpec(
            key,
            title,
            steps,
            None if shard is None else shard.token,
            function,
            tensor_slots,
            template,
            segment,
            mode,
            needs_grad,
            buffers,
            rank,
            peers,
            raw,
            context,
        )

    @property
    def title(self) -> str:
        """The name of the function or of the layers."""
        return self.spec.title

    @property
    def label(self) -> str:
        draw = self.spec.draw
        if self.spec.rank is not None and draw is None:
            return str(self.spec.rank)
        return label_of(self.key) + ("" if draw is None else f" in {draw}")

    @property
    def needs_grad(self) -> bool:
        return self.tape.kept


class BufferState(Node):
    """The buffers of a function's module after a call, those that it changed; else None."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        super().__init__(new_key("buffers", call.title), call.worker, [call])
        self.call = call
