"""The graph of calls: what a thunk stands for, as data.

A `Node` is one call that has not run, or its result. It knows the nodes whose values it takes and
the worker that it has to run on; an executor turns nodes into tasks and keeps what came of them.
Nodes that compute have the `settings` of torch with which they are to run.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from taskgrad.graph.objects import Opaque
from taskgrad.graph.process_group import Rank
from taskgrad.graph.pytree import carries_gradient, tensors
from taskgrad.graph.torch_settings import TorchSettings, refuse_modes, settings_now

_order = itertools.count(1)


def new_key(action: str, name: str = "") -> str:
    """A task key whose prefix, as the dashboard cuts it, is the action and the layer's name."""
    label = f"{action}:{name}" if name else action
    return f"{label.replace('-', '_').replace(' ', '_')}-{uuid.uuid4().hex}"


def label_of(key: str) -> str:
    """A task, for a message: the prefix of its key."""
    return repr(key.partition("-")[0])


def versions(value: Any) -> list[int | None]:
    """How often each tensor was written in place; inference tensors do not count it."""
    return [None if t.is_inference() else t._version for t in tensors(value)]


class Draw(NamedTuple):
    """What random numbers are drawn for: this microbatch of this training step."""

    seed: int
    step: int
    microbatch: int

    def __str__(self) -> str:
        return f"microbatch {self.microbatch} of step {self.step}"


class Node(Opaque):
    """One value of the graph. `order` rises with creation, so inputs come before users.

    `awaits` are nodes that must have run before, though it takes no value of theirs.
    """

    __slots__ = (
        "__weakref__",
        "awaits",
        "key",
        "order",
        "settings",
        "worker",
    )

    def __init__(self, key: str, worker: str | None) -> None:
        self.key = key
        self.worker = worker  # an address; None: the executor gives it one
        self.order = next(_order)
        self.awaits: tuple[Node, ...] = ()
        self.settings: TorchSettings | None = None  # those under which it runs; None: whichever

    @property
    def inputs(self) -> Sequence[Node]:
        """The nodes whose values this one takes, in order."""
        return ()

    @property
    def label(self) -> str:
        """The task, for a message."""
        return label_of(self.key)

    @property
    def needs_grad(self) -> bool:
        """Whether anything upstream can receive a gradient from this value."""
        return False


class Leaf(Node):
    """A value of the driver's: a pytree, which gradients reach if `needs_grad`.

    A parameter of a module that was given to `spawn` has that module as its `owner`, and its `name`
    there. `taken` is what is sent in its place, where it might be written without torch's noticing.
    A cotangent is `checked` if it is known to fit the value that it is one of.
    """

    __slots__ = ("_needs_grad", "checked", "name", "owner", "taken", "value", "version")

    def __init__(
        self,
        value: Any,
        *,
        needs_grad: bool | None = None,
        name: str = "",
        owner: Any = None,
        checked: bool = False,
    ) -> None:
        super().__init__(new_key("input"), None)
        self.checked = checked
        self.value = value
        self.name = name
        self.owner = owner
        self.taken: Any = None
        found = tensors(value)
        if needs_grad is None:
            needs_grad = any(t.requires_grad for t in found)
        self._needs_grad = needs_grad and any(map(carries_gradient, found))
        self.version = versions(value)

    @property
    def needs_grad(self) -> bool:
        return self._needs_grad

    def write(self, value: torch.Tensor) -> None:
        """Give the leaf's tensor, in place, the value that a call gave a buffer."""
        with torch.no_grad():
            self.value.copy_(value)
        self.version = versions(self.value)


class Foreign(Node):
    """A value of another Dask collection; gradients stop here."""

    __slots__ = ("collection",)

    def __init__(self, collection: Any) -> None:
        super().__init__(collection.key, None)
        self.collection = collection


class Primal(Node):
    """Another node's value, taken as an input to differentiate by: gradients stop here."""

    __slots__ = ("source",)

    def __init__(self, source: Node) -> None:
        super().__init__(new_key("input"), source.worker)
        self.source = source

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.source,)

    @property
    def needs_grad(self) -> bool:
        return True


def resolve(node: Node) -> Node:
    """The node whose value this one's is."""
    while isinstance(node, Primal):
        node = node.source
    return node


class ChainRef:
    """What tells the shards of one chain from those of another: its title, and identity.

    `trained_by` gives the Trainer or Optimizer that works with them, None if there is none now.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.trained_by: Callable[[], Any] = _nothing


def _nothing() -> None:
    """No trainer was ever made."""


class Shard:
    """Layers of one chain on one worker, as the driver knows them.

    `token` is the key of the task that put them there, whose result an executor holds for as long
    as this object exists. Every call of the shard refers to it. `homes` names the shards where
    parameters live of which this one has a copy, because they are tied over two workers; `hooked`
    are the parameters that live here with hooks on their gradients.
    """

    def __init__(self, chain: ChainRef, token: str, worker: str) -> None:
        self.chain = chain
        self.token = token
        self.worker = worker
        self.homes: dict[str, Shard] = {}
        self.hooked: set[str] = set()


class Call(Node):
    """One forward task: layers of a shard in a row, or one function.

    Parameters
    ----------
    steps
        (index, name, kind) of the layers that run one after the other; for a function one step.
    shard
        The resident shard that the steps belong to; None for a function.
    function
        The packed function; its tensors are inputs, at the slots `tensor_slots`.
    template
        Pickled (args, kwargs) of the first step, with a `Slot` for each input.
    parameters
        Names of the trainable parameters that the steps use.
    buffers
        The slots that hold buffers of a function's module.

    In a training step also: `draw`, whose streams the layers draw from; `begins`, the step that
    starts on the shard with this call; `recompute`, the (start, stop) of those steps that keep only
    their input and run again in the backward; `extras`, the pickled further arguments of the last
    step, the loss; `check_finite`, whether that may only be a finite number.

    A function that is `raw` takes its inputs as they came: it copies what it writes, and makes its
    own leaves of autograd.

    A call that is one `rank` of a gang knows the keys of all of them as its `peers`.
    """

    __slots__ = (
        "_inputs",
        "_needs_grad",
        "begins",
        "buffers",
        "check_finite",
        "draw",
        "extras",
        "function",
        "kind",
        "mode",
        "parameters",
        "peers",
        "pending",
        "rank",
        "raw",
        "recompute",
        "returns_buffers",
        "shard",
        "spent",
        "steps",
        "taped",
        "template",
        "tensor_slots",
        "title",
    )

    def __init__(
        self,
        *,
        title: str,
        steps: tuple[tuple[int, str, str], ...],
        inputs: Sequence[Node],
        template: bytes,
        shard: Shard | None = None,
        function: bytes = b"",
        tensor_slots: tuple[int, ...] = (),
        parameters: tuple[str, ...] = (),
        buffers: tuple[int, ...] = (),
        mode: bool | None = None,
        worker: str | None = None,
        kind: str = "forward",
        rank: Rank | None = None,
        raw: bool = False,
    ) -> None:
        refuse_modes(title)
        super().__init__(new_key(kind, title), worker)
        self.settings = settings_now()
        self.title = title
        self.kind = kind
        self.steps = steps
        self.shard = shard
        self.function = function
        self.tensor_slots = tensor_slots
        self.template = template
        self.parameters = parameters
        self.buffers = buffers
        self.mode = mode  # True: train, False: eval, None: as the layers are
        self._inputs = tuple(inputs)
        self._needs_grad = bool(parameters) or any(i.needs_grad for i in inputs)
        self.taped = self.settings.grad and self._needs_grad
        self.spent = False
        self.returns_buffers = False  # whether a BufferState of it is run with it
        self.pending = 0  # autograd functions on the driver that have yet to use the tape
        self.draw: Draw | None = None
        self.begins: int | None = None
        self.recompute: tuple[tuple[int, int], ...] = ()
        self.extras = b""
        self.check_finite = False
        self.rank = rank
        self.raw = raw
        self.peers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.rank is not None:
            return str(self.rank)
        return label_of(self.key) + ("" if self.draw is None else f" in {self.draw}")

    def append(self, step: tuple[int, str, str], inputs: Sequence[Node], extras: bytes) -> None:
        """One more step, which takes these inputs beside the output so far."""
        self.steps = (*self.steps, step)
        self._inputs = (*self._inputs, *inputs)
        self.extras = extras

    def drop_tape(self) -> None:
        """Have it leave no tape, and record nothing for one."""
        if self.taped:
            assert self.settings is not None
            self.taped, self.settings = False, self.settings.without_grad()

    @property
    def inputs(self) -> Sequence[Node]:
        return self._inputs

    @property
    def needs_grad(self) -> bool:
        return self.taped


class Pullback(Node):
    """One backward task: cotangents of a call's output in, cotangents of its inputs out.

    Parameters
    ----------
    call
        The forward whose tape it uses, on the worker where that is.
    cotangents
        Nodes to sum, in this order; None stands for ones (the output must be a scalar).
    wanted
        The input slots whose cotangents are given back.
    retain
        Keep the tape for another backward.

    In a training step also: `factor`, by which a cotangent of ones is multiplied, and `weight`, the
    node of another; `accumulate`, for each parameter whose gradients are now complete, what to add
    to it: pullbacks on this worker, this one included, and gradients from others.

    Where the call is a rank of a gang: `peers`, the keys of the pullbacks of all its ranks.
    """

    __slots__ = (
        "accumulate",
        "call",
        "cotangents",
        "factor",
        "peers",
        "retain",
        "wanted",
        "weight",
    )

    def __init__(
        self,
        call: Call,
        cotangents: Sequence[Node | None],
        wanted: tuple[int, ...],
        retain: bool,
    ) -> None:
        refuse_modes(f"the backward of {call.title}")
        super().__init__(new_key("backward", call.title), call.worker)
        self.settings = settings_now()
        self.call = call
        self.cotangents = tuple(cotangents)
        self.wanted = wanted
        self.retain = retain
        self.factor = 1.0
        self.weight: Node | None = None
        self.accumulate: dict[str, tuple[Node, ...]] = {}
        self.peers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        draw = self.call.draw
        return label_of(self.key) + ("" if draw is None else f" in {draw}")

    @property
    def inputs(self) -> Sequence[Node]:
        found: list[Node] = [c for c in self.cotangents if c is not None]
        if self.weight is not None:
            found.append(self.weight)
        parts = dict.fromkeys(p for parts in self.accumulate.values() for p in parts)
        return (*found, *(p for p in parts if p is not self))


class Element(Node):
    """One element of another node's value, which is a sequence."""

    __slots__ = ("position", "source")

    def __init__(self, source: Node, position: int, *, key: str) -> None:
        super().__init__(key, source.worker)
        self.source = source
        self.position = position

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.source,)


class CotangentCheck(Node):
    """Whether a cotangent fits a call's output, asked where the call's tape is."""

    __slots__ = ("call", "cotangent")

    def __init__(self, call: Call, cotangent: Node) -> None:
        super().__init__(new_key("check", call.title), call.worker)
        self.call = call
        self.cotangent = cotangent
        self.awaits = (call,)

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.cotangent,)


class Sum(Node):
    """Cotangents of one value added up, in order; None counts as zero."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Node], name: str, worker: str | None) -> None:
        super().__init__(new_key("sum", name), worker)
        self.settings = settings_now()
        self.parts = tuple(parts)

    @property
    def inputs(self) -> Sequence[Node]:
        return self.parts


class BufferState(Node):
    """The buffers of a function's module after a call, those that it changed; else None."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        super().__init__(new_key("buffers", call.title), call.worker)
        self.call = call

    @property
    def inputs(self) -> Sequence[Node]:
        return (self.call,)


class ShardCall(Node):
    """Something done to or read from a shard where it lives: gradients, an optimizer step.

    `function` is one of `taskgrad.worker`, called there with the store, the shard's token and the
    values of `after`, in order; `arguments` are its keyword arguments as plain data.
    """

    __slots__ = ("after", "arguments", "function", "shard")

    def __init__(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        key: str,
        after: Sequence[Node] = (),
    ) -> None:
        super().__init__(key, shard.worker)
        # It is the shard that says on which device things are made.
        self.settings = settings_now().without_device()
        self.shard = shard
        self.function = function
        self.arguments = arguments
        self.after = tuple(after)

    @property
    def label(self) -> str:
        step = self.arguments.get("step")
        return label_of(self.key) + ("" if step is None else f" of step {step}")

    @property
    def inputs(self) -> Sequence[Node]:
        return self.after


def walk(starts: Iterable[Node], onward: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Each node that can be reached from these, once, users before inputs of one path."""
    found: dict[Node, None] = {}
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
