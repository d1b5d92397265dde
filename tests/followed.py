"""Run a captured graph in plain Python, without workers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taskgrad.graph import pack
from taskgrad.graph.any_model import in_layers
from taskgrad.graph.capture import Capture, refuse_reading
from taskgrad.graph.functions import Template
from taskgrad.graph.layer_graph import Captured
from taskgrad.graph.pytree import flatten
from taskgrad.worker.settings import in_thread
from taskgrad.worker_names import WorkerName


def run_graph(captured: Captured, modules: list[Any]) -> Any:
    """The output of a graph, each step run in order, by the layers themselves."""
    graph = captured.graph
    values: dict[int, Any] = dict(enumerate(captured.inputs))
    for step in graph.steps:
        if isinstance(step.target, str):
            owner, _, name = step.target.rpartition(".")
            values[step.results[0][1]] = getattr(modules[step.layer].get_submodule(owner), name)
            continue
        function = modules[step.layer]
        if step.target is not None:
            function = pack.unpack(step.target, [], own=False)
        args, kwargs = Template(step.template).fill(values)
        with in_thread(step.settings, WorkerName("here")):
            result = function(*args, **kwargs)
        leaves = flatten(result)[0]
        values |= {number: leaves[position] for position, number in step.results}
        if step.arguments_written:
            leaves = flatten((args, kwargs))[0]
            values |= {number: leaves[i] for i, number in step.arguments_written}
        for number in step.given:
            assert tuple(values[number].shape) == graph.values[number].shape
    return Template(graph.output).fill(values)[0][0]


class Followed:
    """A model beside its graphs: `check` compares what they give, and counts the captures."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        found = in_layers(
            model,
            options.get("example_inputs"),
            options.get("cut"),
            options.get("keep_together"),
            options.get("workers", 2),
        )
        assert found.capture is not None
        self.layered = found
        self.capture: Capture = found.capture
        self.graphs: list[Any] = []

    def find(self, *args: Any, mode: bool | None = None, **kwargs: Any) -> Captured:
        captured = self.capture.find(args, kwargs, mode, refuse_reading)
        if all(captured.graph is not graph for graph in self.graphs):
            self.graphs.append(captured.graph)
        return captured

    def check(self, *args: Any, mode: bool | None = None, **kwargs: Any) -> Any:
        """Compare outputs and gradients with the model's own; returns the output."""
        captured = self.find(*args, mode=mode, **kwargs)
        if mode is not None:
            self.model.train(mode)
        torch.manual_seed(0)
        expected = self.model(*args, **kwargs)
        wanted = self._gradients(expected)
        torch.manual_seed(0)
        given = run_graph(captured, self.layered.flat.modules)
        assert type(given) is type(expected)
        for a, b in zip(flatten(given)[0], flatten(expected)[0], strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a == b
        for a, b in zip(self._gradients(given), wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            assert (a is None) == (b is None)
        return given

    def _gradients(self, output: Any) -> list[torch.Tensor | None]:
        self.model.zero_grad()
        parts = [t.square().sum() for t in flatten(output)[0] if getattr(t, "requires_grad", False)]
        if parts:
            sum(parts).backward()
        return [p.grad for p in self.model.parameters()]
