"""The layout of a model whose graph is that of its own forward, which is captured for a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.graph.calls import Call, LayerStep
from taskgrad.graph.functions import template
from taskgrad.graph.layer_graph import FUNCTION, Captured, LayerGraph
from taskgrad.graph.layers import Model
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Element, Node, new_key
from taskgrad.graph.pytree import flatten
from taskgrad.graph.segments import packed
from taskgrad.graph.shards import Shard
from taskgrad.graph.torch_settings import settings_now
from taskgrad.layout import Autocast, Extend, Layout
from taskgrad.plan.graph_stages import GraphStage, graph_stages
from taskgrad.worker.settings import in_thread
from taskgrad.worker_names import WorkerName

Capture = Callable[[tuple[Any, ...], Mapping[str, Any], bool | None], Captured]
"""(args, kwargs, mode) of a call of the model -> its graph, with the values of the inputs."""

# The arguments of a call whose steps have arguments of their own.
_NO_ARGUMENTS = template(((), {}))
# Graphs whose stages are kept: a model has one for each structure of its inputs.
_MAX_GRAPHS = 64


class _Stage(NamedTuple):
    """What the calls of a stage have in common."""

    title: str
    steps: tuple[LayerStep, ...]
    shard: Shard
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    single: bool
    differentiable: bool
    segment: bytes
    parameters: tuple[str, ...]


class _Stages(NamedTuple):
    """The stages of a graph, in order.

    `needs` are for each its worker and the stages that it takes values of.
    """

    graph: LayerGraph
    stages: tuple[_Stage, ...]
    needs: tuple[tuple[str, tuple[int, ...]], ...]


class CapturedLayout(Layout):
    """A layout whose calls are the stages of the model's graph, which `capture` finds for a call.

    What it makes of a graph is kept for other calls with the same graph object.

    Parameters
    ----------
    title, flat, workers, session, starts
        See `Layout`. The model's layers, in any order; what runs in which order is in its graphs.
    capture
        Gives the graph of one call, and the tensors that are its inputs.
    """

    is_traced = True

    def __init__(
        self,
        title: str,
        flat: Model,
        workers: Sequence[str],
        session: Session,
        starts: frozenset[int],
        capture: Capture,
    ) -> None:
        super().__init__(title, flat, workers, session, starts)
        self._capture = capture
        self._workers = tuple(workers)
        self._functions: dict[str, str] = {}  # by name, the workers of functions
        self._stages: OrderedDict[int, _Stages] = OrderedDict()  # by the ids of their graphs
        self._planned: Captured | None = None

    def plan_for(self, captured: Captured) -> None:
        """Make training steps for calls like this one: `planned_calls`, `first` and `last` are its.

        Calls of a step whose stages are others are errors from now on.
        """
        self._stages_of(captured.graph)
        self._planned = captured

    def planned_calls(self) -> list[Call]:
        if self._planned is None:
            raise TaskgradError(
                f"{self.title} has no plan before its forward was followed: give GraphChain "
                "example_inputs=, or the trainer a batch"
            )
        return self.calls_of(self._planned, mode=True)

    @property
    def first(self) -> Shard:
        return super().first if self._planned is None else self._end(0)

    @property
    def last(self) -> Shard:
        return super().last if self._planned is None else self._end(-1)

    def _end(self, place: int) -> Shard:
        assert self._planned is not None
        return self._stages_of(self._planned.graph).stages[place].shard

    def calls(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
    ) -> list[Call]:
        self.refuse_modes()
        given = tuple(map(_value, args)), {name: _value(value) for name, value in kwargs.items()}
        with in_thread(settings_now().under_autocast(autocast), WorkerName("driver")):
            captured = self._capture(*given, mode)
        return self.calls_of(captured, mode=mode, autocast=autocast, extend=extend)

    def calls_of(
        self,
        captured: Captured,
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
    ) -> list[Call]:
        """The calls of a captured one, one a stage; the last one returns the model's output.

        Raises TaskgradError if they are of a training step, and of other stages than its plan.
        """
        graph = captured.graph
        found = self._stages_of(graph)
        if extend is not None:
            self._compare(found)
        settings = settings_now().under_autocast(autocast)
        nodes: dict[int, Node] = {}
        calls: list[Call] = []
        for place, stage in enumerate(found.stages):
            for value in stage.inputs:
                if value not in nodes:
                    nodes[value] = Leaf(captured.inputs[value], kept=True)
            steps, context = stage.steps, None
            inputs = tuple([nodes[value] for value in stage.inputs])
            if extend is not None:
                last = place == len(found.stages) - 1
                steps, inputs, context = extend(steps, inputs, last)
            call = Call(
                title=stage.title,
                steps=steps,
                inputs=inputs,
                template=_NO_ARGUMENTS,
                segment=stage.segment,
                shard=stage.shard,
                parameters=stage.parameters,
                differentiable=stage.differentiable,
                mode=mode,
                worker=stage.shard.worker,
                context=context,
                settings=settings,
            )
            calls.append(call)
            if stage.single:
                nodes[stage.outputs[0]] = call
                continue
            for position, value in enumerate(stage.outputs):
                nodes[value] = Element(
                    call,
                    position,
                    key=new_key("value", stage.title),
                    carries_gradient=graph.values[value].requires_grad,
                )
        return calls

    def _stages_of(self, graph: LayerGraph) -> _Stages:
        found = self._stages.get(id(graph))
        if found is None:
            stages = graph_stages(
                graph, self._workers, starts=self.starts, functions=self._functions
            )
            made = tuple(self._stage(graph, s, s is stages[-1]) for s in stages)
            found = _Stages(graph, made, tuple((s.worker, s.needs) for s in stages))
            self._stages[id(graph)] = found
            if len(self._stages) > _MAX_GRAPHS:
                self._stages.popitem(last=False)
        return found

    def _stage(self, graph: LayerGraph, stage: GraphStage, last: bool) -> _Stage:
        used = [graph.steps[number] for number in stage.steps]
        layers = [self.layers[step.layer] for step in used if step.layer != FUNCTION]
        parameters = dict.fromkeys(n for layer in layers for n in self.trained_by(layer))
        titles = [step.name for step in used if step.layer != FUNCTION and step.target is None]
        titles = titles or [step.name for step in used] or ["output"]
        carries = [graph.values[value].requires_grad for value in stage.outputs]
        return _Stage(
            title=titles[0] if len(titles) == 1 else f"{titles[0]}..{titles[-1]}",
            steps=tuple([(step.layer, step.name, step.kind) for step in used]),
            shard=next(shard for shard in self.shards if shard.worker == stage.worker),
            inputs=stage.inputs,
            outputs=stage.outputs,
            single=not last and carries == [True],
            differentiable=last or any(carries),
            segment=packed(graph, stage.steps, stage.inputs, None if last else stage.outputs),
            parameters=tuple(parameters),
        )

    def _compare(self, found: _Stages) -> None:
        """Raise TaskgradError if these stages are not those that a trainer has a plan of."""
        planned = None if self._planned is None else self._stages_of(self._planned.graph)
        if planned is None or planned.needs == found.needs:
            return

        def described(stages: _Stages) -> Iterator[str]:
            for stage, (_, needs) in zip(stages.stages, stages.needs, strict=True):
                given = ", ".join(stages.stages[i].title for i in needs) or "the batch"
                yield f"{stage.title} of {given}"

        raise TaskgradError(
            f"the forward of {self.title} takes another way with this batch than its trainer has a "
            f"plan for: stages {'; '.join(described(found))}, and not "
            f"{'; '.join(described(planned))}. Workers and schedule are for one order of stages: "
            "name the part of the model that decides in keep_together=, give its layers one "
            "worker, or make another Trainer"
        )


def _value(argument: Any) -> Any:
    """An argument of the model as its forward is followed with: the value that a leaf has.

    Raises TaskgradError if it is not on the driver yet.
    """
    if isinstance(argument, Leaf):
        return argument.value if argument.needs_grad else argument.sent()
    lazy = next((leaf for leaf in flatten(argument)[0] if isinstance(leaf, Node)), None)
    if lazy is not None:
        raise TaskgradError(
            "the forward of this model is followed on the driver, which needs its inputs there, "
            f"and {lazy.label} is on a worker: collect it first"
        )
    return argument
