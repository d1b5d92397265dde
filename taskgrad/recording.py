"""What a Python function does with its input: the calls of chains, modules and functions in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from taskgrad.cluster.session import WorkerSpec
from taskgrad.errors import TaskgradError
from taskgrad.graph.functions import pack_function
from taskgrad.graph.layers import kind_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import flatten
from taskgrad.graph.torch_settings import TorchSettings, refuse_modes, settings_now
from taskgrad.layout import Entry, entry_of
from taskgrad.thunk import Inputs, Thunk
from taskgrad.tracing import traced_by


class Recorded(Node):
    """The value of one call of a recording."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call in a function.

    Attributes
    ----------
    value
        The node that stands for its value.
    target
        The layout of the chain, or the module, that was called; None for a function.
    title
        The name of the function; "" for a chain or a module.
    entry
        The arguments. Their nodes are values of other calls, the input, or leaves.
    settings
        Torch's when the call was made.
    worker
        The worker that was asked for, if any.
    function, tensor_slots
        As `CallSpec` has them.
    """

    value: Recorded
    target: Any
    title: str
    entry: Entry
    settings: TorchSettings
    worker: WorkerSpec | None = None
    function: bytes = b""
    tensor_slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """The calls that a function made, in order, and the node that it returned."""

    input: Node
    calls: list[RecordedCall]
    output: Node

    @cached_property
    def sources(self) -> list[tuple[int | None, ...]]:
        """For each call where its arguments are from: a call's number, -1 for the input, or None.

        Last of all comes where the output is from.
        """
        number: dict[Node, int] = {call.value: i for i, call in enumerate(self.calls)}
        number[self.input] = -1
        taken = [call.entry.inputs for call in self.calls]
        return [tuple([number.get(n) for n in nodes]) for nodes in (*taken, (self.output,))]

    def used(self) -> list[int]:
        """The numbers of those calls that the output depends on."""
        wanted = {self.output}
        found = []
        for i, call in reversed([*enumerate(self.calls)]):
            if call.value in wanted:
                found.append(i)
                wanted |= set(call.entry.inputs)
        return found[::-1]


def record(
    function: Callable[..., Any],
    given: Node,
    title: str,
    part_of: Callable[[nn.Module], Any],
) -> Recording:
    """Call a function of the input and record what it does; nothing runs.

    `part_of` returns the target of a module whose parameters are kept on a worker; None for one
    without any, which is sent with each call, as functions are.

    Raises what the function does; TypeError or TaskgradError if it cannot be recorded.
    """
    recorder = _Recorder(given, title, part_of)
    with traced_by(recorder):
        output = function(Thunk(given))
        leaves = flatten(output, _is_thunk)[0]
        if not isinstance(output, Thunk) and any(map(_is_thunk, leaves)):
            output = recorder.spawn(_together, (output,), {}, None)
    node = output._node if isinstance(output, Thunk) else None
    if not isinstance(node, Recorded) or node not in recorder.values:
        raise TypeError(
            f"{title} returns what the chains and functions in it make of its input, a thunk or a "
            f"pytree of thunks; it gave {type(output).__name__}"
        )
    return Recording(given, recorder.calls, node)


def _is_thunk(leaf: Any) -> bool:
    return isinstance(leaf, Thunk)


def _together(value: Any) -> Any:
    return value


class _Recorder:
    """A `Tracer` that records calls."""

    def __init__(self, given: Node, title: str, part_of: Callable[[nn.Module], Any]) -> None:
        self.calls: list[RecordedCall] = []
        self.values: set[Node] = {given}
        self._title = title
        self._part_of = part_of

    def call(self, layout: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Thunk:
        return self._add(layout, "", entry_of(args, kwargs, layout.title))

    def spawn(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        worker: WorkerSpec | None,
    ) -> Thunk:
        title = kind_of(fn).strip("<>")
        target = self._part_of(fn) if isinstance(fn, nn.Module) else None
        if target is not None:
            return self._add(target, "", entry_of(args, kwargs, title), worker)
        packed = pack_function(fn, title)
        for found in packed.closed_over:
            if found.owner is not None or found.is_buffer:
                raise TypeError(
                    f"{title!r} in {self._title} has {found.name or 'a buffer'!r} of a module, "
                    "which no worker would keep: make the module outside of the function, once, "
                    "and call tg.spawn(module, ...), or make it a tg.GraphChain"
                )
        inputs = Inputs()
        slots = tuple([inputs.slot(tensor) for tensor in packed.tensors])
        template = inputs.template((tuple(args), dict(kwargs)), title)
        entry = Entry(tuple(inputs.nodes), template, None)
        return self._add(None, title, entry, worker, packed.data, slots)

    def _add(
        self,
        target: Any,
        title: str,
        entry: Entry,
        worker: WorkerSpec | None = None,
        function: bytes = b"",
        slots: tuple[int, ...] = (),
    ) -> Thunk:
        what = title or (kind_of(target) if isinstance(target, nn.Module) else target.title)
        refuse_modes(what)
        settings = settings_now()
        for node in entry.inputs:
            if isinstance(node, Leaf):
                if node.needs_grad and settings.grad:
                    raise TypeError(
                        f"{what!r} in {self._title} takes a tensor of the driver's that requires "
                        "grad, which no worker would train: make it a parameter of a module that "
                        "is given to tg.spawn, or of a tg.GraphChain; or .detach() it"
                    )
            elif node not in self.values:
                raise TaskgradError(
                    f"{what!r} in {self._title} takes what was not made in it by a chain or by "
                    "tg.spawn: a thunk from outside, a Dask collection, or the result of another "
                    "function of taskgrad, such as tg.map"
                )
        value = Recorded(new_key("recorded", what), None)
        call = RecordedCall(value, target, title, entry, settings, worker, function, slots)
        self.calls.append(call)
        self.values.add(value)
        return Thunk(value)
