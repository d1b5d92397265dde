"""Segments: what one stage of a model's graph runs, as straight-line steps over numbered values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.graph.functions import Template
from taskgrad.graph.layer_graph import Expected, GraphStep, LayerGraph
from taskgrad.graph.torch_settings import TorchSettings


@dataclass(frozen=True)
class SegmentStep:
    """One step of a segment, without its name, which is in the call; see `GraphStep`.

    `settings` are those of torch's settings, by name, in which it differs from its call.
    """

    target: str | bytes | None
    template: bytes
    inputs: tuple[int, ...]
    results: tuple[tuple[int, int], ...]
    settings: Mapping[str, Any]
    expected: Expected | None
    arguments_written: tuple[tuple[int, int], ...]

    @cached_property
    def function(self) -> Any:
        """The function that it calls."""
        assert isinstance(self.target, bytes)
        return pack.unpack(self.target, (), own=False)

    @property
    def given(self) -> list[int]:
        """The numbers of the values that it gives."""
        return [number for _, number in (*self.results, *self.arguments_written)]


@dataclass(frozen=True)
class Segment:
    """The steps of a stage. Values have the numbers that they have in the graph.

    Attributes
    ----------
    first
        The number of its first step in the graph, which orders the stages that a module is in.
    inputs
        The values that are the inputs of the call, in order.
    steps
        In order.
    outputs
        The values that it returns: one alone, or a tuple of several. None for the last stage.
    output
        The packed ``((output,), {})`` of the last stage.
    output_values
        The values in the output, or `outputs`.
    single
        True if it returns its one output, and not a tuple.
    """

    first: int
    inputs: tuple[int, ...]
    steps: tuple[SegmentStep, ...]
    outputs: tuple[int, ...] | None
    output: bytes
    output_values: tuple[int, ...]
    single: bool

    @staticmethod
    def of(data: bytes) -> Segment:
        """The segment that `packed` packed, unpickled once. Nothing in it changes."""
        return _unpacked(data)

    @cached_property
    def drops(self) -> tuple[tuple[int, ...], ...]:
        """For each step the values that no later one takes, nor the result."""
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            last |= dict.fromkeys((*step.inputs, *step.given), i)
        for value in self.output_values:
            last.pop(value, None)
        found: list[list[int]] = [[] for _ in self.steps]
        for value, i in last.items():
            found[i].append(value)
        return tuple(map(tuple, found))

    def takes(self, start: int, stop: int) -> tuple[int, ...]:
        """The values that the steps from `start` to `stop` take and do not make themselves."""
        made: set[int] = set()
        found: dict[int, None] = {}
        for step in self.steps[start:stop]:
            found |= dict.fromkeys(v for v in step.inputs if v not in made)
            made.update(step.given)
        return tuple(found)

    def gives(self, start: int, stop: int) -> tuple[int, ...]:
        """The values of these steps that later ones take, or the result."""
        later = {v for step in self.steps[stop:] for v in step.inputs} | {*self.output_values}
        made = dict.fromkeys(v for step in self.steps[start:stop] for v in step.given)
        return tuple(v for v in made if v in later)

    def result(self, values: Mapping[int, Any]) -> Any:
        """What the call returns, given the values in it."""
        if self.outputs is None:
            (output,), _ = Template.of(self.output).fill(values)
            return output
        found = tuple([values[v] for v in self.outputs])
        return found[0] if self.single else found


def packed(
    graph: LayerGraph,
    steps: Sequence[int],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...] | None,
) -> bytes:
    """The segment of these steps of a graph, which gives these values; None for its output.

    It gives a value alone if that is the only one and a gradient can reach it.

    Raises TaskgradError if a step runs under settings of the process that its call lacks.
    """
    single = outputs is not None and len(outputs) == 1 and graph.values[outputs[0]].requires_grad
    segment = Segment(
        first=steps[0] if steps else 0,
        inputs=inputs,
        steps=tuple([_step(graph, graph.steps[number]) for number in steps]),
        outputs=outputs,
        output=graph.output if outputs is None else b"",
        output_values=graph.output_values if outputs is None else outputs,
        single=single,
    )
    data: bytes = pack.dumps(segment, lambda part: None)
    return data


def _step(graph: LayerGraph, step: GraphStep) -> SegmentStep:
    own, theirs = step.settings, graph.settings
    if own.process != theirs.process:
        changed = {name for name, _ in {*own.process} ^ {*theirs.process}}
        raise TaskgradError(
            f"the model's forward calls {step.name!r} ({step.kind}) within a setting of the whole "
            f"process ({', '.join(sorted(changed))}), which cannot change within a stage. Name the "
            "part of the model that sets it in keep_together=, so that it runs whole"
        )
    settings = {
        f.name: value
        for f in fields(TorchSettings)
        if f.name != "process" and (value := getattr(own, f.name)) != getattr(theirs, f.name)
    }
    return SegmentStep(
        step.target,
        step.template,
        step.inputs,
        step.results,
        settings,
        step.expected,
        step.arguments_written,
    )


@lru_cache(maxsize=1024)
def _unpacked(data: bytes) -> Segment:
    found: Segment = pack.loads_plain(data)
    return found
