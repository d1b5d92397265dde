"""The graph of a model's layers, as following its forward found it: plain data.

A model that is no Sequential is a graph: layers, and functions between them, that take values and
give values. `GraphChain` makes it of the model's own forward; stages and programs are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from taskgrad.graph.torch_settings import STARTING, TorchSettings

FUNCTION = -2
"""The index of a function among the steps of a call, where layers have theirs."""


@dataclass(frozen=True)
class Value:
    """A value between layers, a tensor, as the capture saw it.

    Attributes
    ----------
    step
        The number of the step that gives it; None for an input.
    shape, dtype
        The tensor's.
    requires_grad
        True if a gradient can reach it.
    """

    step: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Expected:
    """What a layer's result has to be like where its shapes could not be inferred.

    `shapes` has the shape of each leaf that is a tensor, None for others; `others` has the leaves
    that are none, and None for tensors.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    others: tuple[Any, ...]


@dataclass(frozen=True)
class GraphStep:
    """One thing that runs: a layer, a function, or a read of a parameter.

    Attributes
    ----------
    layer
        The index of the layer in the model; `FUNCTION` for a function.
    name, kind
        The layer's name and class, of further calls of one layer with their number after the name
        (``"block (call 2)"``); of a function a name of its own in the graph (``"add_1"``), and what
        it is (``"add"``); of a read the parameter's full name, and ``"Parameter"`` or ``"Buffer"``.
    target
        None: the layer is called. A text: the result is the layer's parameter or buffer of this
        name. Bytes: a packed function, without tensors.
    template
        The packed (args, kwargs), as `taskgrad.graph.functions.template` makes them, with
        ``Slot(v)`` for the value number v. Empty for a read.
    inputs
        The numbers of the values in the template, each once, in order.
    results
        For each value that it gives: its position among the leaves of the result (as
        `taskgrad.graph.pytree.flatten` has them), and its number.
    settings
        Torch's where it was called.
    expected
        What is checked when it has run; None if the result's shapes were inferred.
    arguments_written
        If the call writes tensors into objects among its arguments (a cache, say): for each value
        that it gives in that way, its position among the leaves of ``(args, kwargs)`` when the call
        has returned, and its number.
    """

    layer: int
    name: str
    kind: str
    target: str | bytes | None
    template: bytes
    inputs: tuple[int, ...]
    results: tuple[tuple[int, int], ...]
    settings: TorchSettings
    expected: Expected | None = None
    arguments_written: tuple[tuple[int, int], ...] = ()

    @property
    def given(self) -> Iterator[int]:
        """The numbers of the values that it gives."""
        return (number for _, number in (*self.results, *self.arguments_written))


@dataclass(frozen=True)
class LayerGraph:
    """The layers of a model, in the order in which its forward calls them.

    Attributes
    ----------
    values
        All values by their number; the first `n_inputs` are inputs, tensors of the driver's.
    n_inputs
        How many inputs there are. Those that no step takes are not needed.
    steps
        In order; each takes inputs and values of earlier steps only.
    output
        The packed ``((output,), {})`` with slots for values, as a template.
    output_values
        The numbers of the values in it, each once, in order.
    together
        Groups of steps that have to be in one stage: one of them writes in place into what others
        of them give, or see a part of.
    settings
        Torch's where the model was called. A step with others runs with what differs of them in
        place of that of the call, whichever settings this is made with.
    effects
        Steps that run though nothing may take what they give: layers that may write their buffers.
    kept
        If these are only steps of the begin or the middle of a forward, which has no output then:
        the values that are there for later steps.
    """

    values: tuple[Value, ...]
    n_inputs: int
    steps: tuple[GraphStep, ...]
    output: bytes
    output_values: tuple[int, ...]
    together: tuple[tuple[int, ...], ...] = ()
    settings: TorchSettings = STARTING
    effects: tuple[int, ...] = ()
    kept: tuple[int, ...] | None = None

    @cached_property
    def users(self) -> Mapping[int, tuple[int, ...]]:
        """For each value the steps that take it, in order."""
        found: dict[int, list[int]] = {}
        for number, step in enumerate(self.steps):
            for value in step.inputs:
                found.setdefault(value, []).append(number)
        return {value: tuple(steps) for value, steps in found.items()}


@dataclass(frozen=True)
class Captured:
    """One call of a model: its graph, and the values of the graph's inputs.

    `inputs` has for each input a tensor of the driver's, or the node of a value that an earlier
    part of the forward gives; None where no step takes it.
    """

    graph: LayerGraph
    inputs: tuple[Any, ...] = field(default=())
