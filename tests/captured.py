"""Graphs of models that are written by hand, and chains of them.

A forward is a function of a `Calls` and of inputs: `Plain` runs it in plain torch, `Recorder` makes
its graph. So each test has one forward, whatever runs it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import taskgrad as tg
from taskgrad.captured_layout import CapturedLayout
from taskgrad.cluster.session import session
from taskgrad.display.placement import placement_table
from taskgrad.graph.deferred_init import DeferredInit
from taskgrad.graph.functions import pack_function, template
from taskgrad.graph.layer_graph import (
    FUNCTION,
    Captured,
    Expected,
    GraphStep,
    LayerGraph,
    Value,
)
from taskgrad.graph.layers import Layer, Model, _inventory, _skeleton
from taskgrad.graph.pytree import Slot, flatten, map_leaves
from taskgrad.graph.torch_settings import settings_now


class Plain:
    """Runs a forward in plain torch; layers draw from the streams of a microbatch, if given."""

    def __init__(self, model: nn.Module, draw: tuple[int, int, int] | None = None) -> None:
        self.model = model
        self._draw = draw
        self._counts: Counter[str] = Counter()

    def _called(self, name: str) -> str:
        self._counts[name] += 1
        count = self._counts[name]
        return name if count == 1 else f"{name} (call {count})"

    def layer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._called(name), self.model.get_submodule(name), *args, **kwargs)

    def function(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._counts[fn.__name__] += 1
        return self._run(f"{fn.__name__}_{self._counts[fn.__name__]}", fn, *args, **kwargs)

    def read(self, layer: str, name: str) -> Any:
        return getattr(self.model.get_submodule(layer), name)

    def together(self, *tensors: torch.Tensor) -> None:
        pass

    def _run(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._draw is None:
            return fn(*args, **kwargs)
        with tg.random_stream(*self._draw, name):
            return fn(*args, **kwargs)


class Recorder(Plain):
    """Runs a forward, and makes its graph."""

    def __init__(self, model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__(model)
        self._index = {name: i for i, (name, _) in enumerate(model.named_children())}
        self._base = settings_now()
        self._values: list[Value] = []
        self._kept: list[torch.Tensor] = []  # their ids are theirs
        self._number: dict[int, int] = {}
        self._steps: list[GraphStep] = []
        self._together: list[tuple[int, ...]] = []
        for value in inputs:
            self._give(value, None)
        self._inputs = len(inputs)
        self._before: Any = ()
        self.expects = False  # whether the results of functions are checked

    def _give(self, tensor: torch.Tensor, step: int | None) -> int:
        number = self._number.get(id(tensor))
        if number is None:
            number = self._number[id(tensor)] = len(self._values)
            shape, grad = tuple(tensor.shape), tensor.requires_grad
            self._values.append(Value(step, shape, tensor.dtype, grad))
            self._kept.append(tensor)
        return number

    def _packed(self, arguments: Any) -> tuple[bytes, tuple[int, ...]]:
        leaves, structure = flatten(arguments)
        found: dict[int, None] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                found[self._number[id(leaf)]] = None
                leaves[i] = Slot(self._number[id(leaf)])
        return template(structure.build(leaves)), tuple(found)

    def _add(
        self, layer: int, name: str, kind: str, target: Any, args: Any, kwargs: Any, result: Any
    ) -> None:
        packed, inputs = self._packed(self._before)
        step = len(self._steps)
        results = self._new(result, step)
        leaves = flatten(result)[0]
        expected = Expected(
            tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves),
            tuple(None if isinstance(x, torch.Tensor) else x for x in leaves),
        )
        self._steps.append(
            GraphStep(
                *(layer, name, kind, target, packed, inputs, results, settings_now()),
                expected if self.expects else None,
                self._new((args, kwargs), step),
            )
        )

    def _new(self, tree: Any, step: int) -> tuple[tuple[int, int], ...]:
        """The places and numbers of tensors that were not there before."""
        return tuple(
            (i, self._give(leaf, step))
            for i, leaf in enumerate(flatten(tree)[0])
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self._number
        )

    def layer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self.model.get_submodule(name)
        self._before = copy.copy(map_leaves(lambda leaf: leaf, (args, kwargs)))
        result = module(*args, **kwargs)
        kind = type(module).__name__
        self._add(self._index[name], self._called(name), kind, None, args, kwargs, result)
        return result

    def function(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._counts[fn.__name__] += 1
        name = f"{fn.__name__}_{self._counts[fn.__name__]}"
        self._before = args, kwargs
        result = fn(*args, **kwargs)
        data = pack_function(fn, name).data
        self._add(FUNCTION, name, fn.__name__, data, args, kwargs, result)
        return result

    def read(self, layer: str, name: str) -> Any:
        found = super().read(layer, name)
        if id(found) in self._number:
            return found
        self._before = (), {}
        kind = "Parameter" if isinstance(found, nn.Parameter) else "Buffer"
        self._add(self._index[layer], f"{layer}.{name}", kind, name, (), {}, found)
        return found

    def together(self, *tensors: torch.Tensor) -> None:
        """The steps that take or give one of these so far have to be in one stage."""
        numbers = {self._number[id(t)] for t in tensors}
        self._together.append(
            tuple(i for i, step in enumerate(self._steps) if numbers & {*step.inputs, *step.given})
        )

    def graph(self, output: Any) -> LayerGraph:
        packed, values = self._packed(((output,), {}))
        return LayerGraph(
            values=tuple(self._values),
            n_inputs=self._inputs,
            steps=tuple(self._steps),
            output=packed,
            output_values=values,
            together=tuple(self._together),
            settings=self._base,
        )


Forward = Callable[..., Any]


def graph_of(
    model: nn.Module, forward: Forward, *inputs: torch.Tensor, expected: bool = False
) -> LayerGraph:
    """The graph of one call."""
    model = copy.deepcopy(model)
    with torch.enable_grad():
        recorder = Recorder(model, inputs)
        recorder.expects = expected
        return recorder.graph(forward(recorder, *inputs))


def model_of(model: nn.Module) -> Model:
    """A model whose children are its layers."""
    children = dict(model.named_children())
    layers = [Layer(i, name, type(m).__name__) for i, (name, m) in enumerate(children.items())]
    modules = list(children.values())
    return Model((), layers, modules, _skeleton(model, modules), _inventory(model, layers))


def captured_chain(
    model: nn.Module,
    forward: Forward,
    placement: Sequence[int],
    *example: torch.Tensor,
    starts: frozenset[int] = frozenset(),
    expected: bool = False,
) -> tg.GraphChain:
    """A chain of a model whose forward is this one; `placement` is by layer.

    With `expected` the graph is that of two samples, whatever is given, and results are checked.
    """
    model = copy.deepcopy(model)
    graphs: dict[Any, LayerGraph] = {}

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: Any, *rest: Any) -> Captured:
        leaves = [leaf for leaf in flatten(args)[0] if isinstance(leaf, torch.Tensor)]
        seen = (mode, *((t.shape, t.requires_grad) for t in leaves))
        if seen not in graphs:
            shown = [t[:2] for t in leaves] if expected else leaves
            graphs[seen] = graph_of(model, forward, *shown, expected=expected)
        return Captured(graphs[seen], tuple(leaves))

    owner = session()
    addresses = [w.address for w in owner.workers()]
    workers = [addresses[i] for i in placement]
    flat = model_of(model)
    chain: Any = object.__new__(tg.GraphChain)
    capture: Any = SimpleNamespace(find=find)
    layout = CapturedLayout(type(model).__name__, flat, workers, owner, starts, capture)
    chain.layout = layout
    chain._skeleton, chain._same_as = flat.skeleton, list(range(len(flat.modules)))
    chain._mode = None
    layout.deploy(flat, None, DeferredInit({}, {}), 0)
    chain.placement = placement_table(flat, workers, layout.devices, owner.names, None)
    if example:
        layout.plan_by(example, {}, (), None)
    return chain
