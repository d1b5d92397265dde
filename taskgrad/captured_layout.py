"""The layout of a model whose graph is that of its own forward, which is captured for a call."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.graph.activation import Activation, CannotFollowError, line_of_user
from taskgrad.graph.calls import Call, Draw, LayerStep
from taskgrad.graph.capture import Capture, Read, refuse_reading
from taskgrad.graph.following import Following
from taskgrad.graph.functions import template
from taskgrad.graph.layer_graph import FUNCTION, Captured, LayerGraph
from taskgrad.graph.layers import Model
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Element, Node, new_key
from taskgrad.graph.objects import is_lazy
from taskgrad.graph.pytree import flatten
from taskgrad.graph.segments import packed
from taskgrad.graph.shards import Shard
from taskgrad.graph.torch_settings import settings_now
from taskgrad.layout import Autocast, Extend, Layout, Select
from taskgrad.plan.graph_stages import GraphStage, graph_stages
from taskgrad.tracing import random_state_kept
from taskgrad.worker.randomness import random_stream
from taskgrad.worker.settings import in_thread
from taskgrad.worker_names import WorkerName

logger = logging.getLogger("taskgrad")

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
    takes_grad: bool
    segment: bytes
    parameters: tuple[str, ...]


class _Stages(NamedTuple):
    """The stages of a graph, in order: where they are, and what their calls have in common."""

    graph: LayerGraph
    placed: tuple[GraphStage, ...]
    stages: tuple[_Stage, ...]

    @property
    def plan(self) -> list[tuple[Any, ...]]:
        """What a plan is made of: of each stage its worker, what it needs, and what it trains."""
        return [
            (at.worker, at.needs, stage.differentiable, bool(stage.parameters), stage.takes_grad)
            for at, stage in zip(self.placed, self.stages, strict=True)
        ]


class CapturedLayout(Layout):
    """A layout whose calls are the stages of the model's graph, which `capture` finds for a call.

    What it makes of a graph is kept for other calls with the same graph object.

    Parameters
    ----------
    title, flat, workers, session, starts
        See `Layout`. The model's layers, in any order; what runs in which order is in its graphs.
    capture
        Finds the graph of one call, and the tensors that are its inputs.
    example
        The arguments (args, kwargs) of a call, if there are some before the first one.
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
        example: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(title, flat, workers, session, starts)
        self._capture = capture
        self._workers = tuple(workers)
        self._functions: dict[str, str] = {}  # by name, the workers of functions
        self._stages: OrderedDict[int, _Stages] = OrderedDict()  # by the ids of their graphs
        self._newest: _Stages | None = None
        self._example = example
        self._said = False
        self._planned: dict[Select | None, Captured] = {}

    def on_shards(self, shards: Mapping[Shard, Shard]) -> CapturedLayout:
        found = super().on_shards(shards)
        assert isinstance(found, CapturedLayout)
        moved = {old.worker: new.worker for old, new in shards.items()}
        found._workers = tuple(moved[worker] for worker in self._workers)
        found._functions, found._stages, found._planned = {}, OrderedDict(), {}
        found._newest = None
        return found

    def planned_calls(self, select: Select | None = None) -> list[Call]:
        if select not in self._planned and self._example is not None:
            args, kwargs = self._example
            with contextlib.suppress(TypeError):  # it need not have what the loss is computed of
                self.plan_by(args, kwargs, (), select)
        if select not in self._planned:
            raise TaskgradError(
                f"{self.title} has no plan before its forward was followed: take a step, or give "
                "GraphChain example_inputs= as batches have them"
            )
        return self.calls_of(self._planned[select], mode=True)

    def plan_by(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        autocast: Autocast,
        select: Select | None,
    ) -> None:
        """Make training steps for calls like this one.

        Calls of a step whose stages are others are errors from now on.
        """
        if select not in self._planned:
            with torch.enable_grad(), random_state_kept():
                captured = self._find(args, kwargs, True, autocast, refuse_reading, select, None)
            self._stages_of(captured.graph)
            self._planned[select] = captured

    def graph(self) -> tuple[LayerGraph, tuple[GraphStage, ...]]:
        """The graph of the newest call, or of the example, and its stages.

        Raises TaskgradError if there is none.
        """
        if self._newest is None and self._example is not None:
            self.calls(*self._example, mode=None)
        if self._newest is None:
            raise TaskgradError(
                f"the forward of {self.title} was not followed yet: call the chain first, or give "
                "GraphChain example_inputs="
            )
        return self._newest.graph, self._newest.placed

    def may_end_at(self, shard: Shard) -> bool:
        return True

    def calls(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
        select: Select | None = None,
        draw: Draw | None = None,
    ) -> list[Call]:
        self.refuse_modes()
        read: Read = partial(self._read, mode) if extend is None else refuse_reading
        planned = None if extend is None else self._planned.get(select)
        captured = self._find(args, kwargs, mode, autocast, read, select, draw)
        return self.calls_of(captured, planned, mode=mode, autocast=autocast, extend=extend)

    def _read(
        self, mode: bool | None, following: Following, activation: Activation
    ) -> torch.Tensor:
        """The value of an activation: what has been followed so far runs now."""
        if not self._said:
            logger.warning(
                "The forward of %s reads the value of an activation%s: each call runs up to there, "
                "brings the value here, and is followed anew.",
                self.title,
                line_of_user(),
            )
            self._said = True
        graph, inputs, numbers = following.built.part()
        if graph.steps:
            with in_thread(graph.settings, WorkerName("driver")):
                _, nodes = self._calls_of(Captured(graph, tuple(inputs)), None, mode, (), None)
            following.built.have_run({number: nodes[value] for number, value in numbers.items()})
        node = following.built.node_of(activation)
        self.executor.run([node], tapes=torch.is_grad_enabled())
        [value] = self.executor.values([node])
        found: torch.Tensor = value
        return found

    def _find(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        mode: bool | None,
        autocast: Autocast,
        read: Read,
        select: Select | None,
        draw: Draw | None,
    ) -> Captured:
        given = tuple(map(_value, args)), {name: _value(value) for name, value in kwargs.items()}

        def stream() -> AbstractContextManager[None]:
            return nullcontext() if draw is None else random_stream(*draw, self.title)

        with in_thread(settings_now().under_autocast(autocast), WorkerName("driver")):
            try:
                return self._capture.find(*given, mode, read, select, stream)
            except CannotFollowError as error:
                raise TaskgradError(_why_not_followed(self.title, error)) from None

    def calls_of(
        self,
        captured: Captured,
        planned: Captured | None = None,
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
    ) -> list[Call]:
        """The calls of a captured one, one a stage; the last one returns the model's output.

        Raises TaskgradError if they are of other stages than what was `planned`.
        """
        return self._calls_of(captured, planned, mode, autocast, extend)[0]

    def _calls_of(
        self,
        captured: Captured,
        planned: Captured | None,
        mode: bool | None,
        autocast: Autocast,
        extend: Extend | None,
    ) -> tuple[list[Call], dict[int, Node]]:
        """The calls, and the nodes of values by their numbers."""
        graph = captured.graph
        found = self._stages_of(graph)
        if planned is not None:
            self._compare(found, self._stages_of(planned.graph))
        settings = settings_now().under_autocast(autocast)
        nodes: dict[int, Node] = {}
        calls: list[Call] = []
        for place, stage in enumerate(found.stages):
            for value in stage.inputs:
                if value not in nodes:
                    given = captured.inputs[value]
                    nodes[value] = given if isinstance(given, Node) else Leaf(given, kept=True)
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
        return calls, nodes

    def _stages_of(self, graph: LayerGraph) -> _Stages:
        found = self._stages.get(id(graph))
        if found is not None:
            self._stages.move_to_end(id(graph))
        else:
            stages = graph_stages(
                graph, self._workers, starts=self.starts, functions=self._functions
            )
            end = stages[-1] if graph.kept is None else None
            made = tuple(self._stage(graph, s, s is end) for s in stages)
            found = _Stages(graph, stages, made)
            self._stages[id(graph)] = found
            if len(self._stages) > _MAX_GRAPHS:
                self._stages.popitem(last=False)
        self._newest = found
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
            takes_grad=any(graph.values[value].requires_grad for value in stage.inputs),
            segment=packed(graph, stage.steps, stage.inputs, None if last else stage.outputs),
            parameters=tuple(parameters),
        )

    def _compare(self, found: _Stages, planned: _Stages) -> None:
        """Raise TaskgradError if these stages are not those that a trainer has a plan of."""
        if planned.plan == found.plan:
            return

        def described(found: _Stages) -> Iterator[str]:
            for stage, at in zip(found.stages, found.placed, strict=True):
                given = ", ".join(found.stages[i].title for i in at.needs) or "the batch"
                yield f"{stage.title} of {given}"

        raise TaskgradError(
            f"the forward of {self.title} takes another way with this batch than its trainer has a "
            f"plan for: stages {'; '.join(described(found))}, and not "
            f"{'; '.join(described(planned))}. Workers and schedule are for one order of stages: "
            "name the part of the model that decides in keep_together=, give its layers one "
            "worker, or make another Trainer"
        )


def _why_not_followed(title: str, error: CannotFollowError) -> str:
    if error.cut_further:
        return (
            f"the forward of {title} cannot be followed: {error}. Give tg.GraphChain "
            f"example_inputs=, with which it finds out where to cut, or name parts of "
            f"{error.module!r} in cut="
        )
    module = error.module or title
    return (
        f"the forward of {module} cannot be followed: {error}. Keep it in one layer, with "
        f"keep_together=[{error.module!r}] of tg.GraphChain"
    )


def _value(argument: Any) -> Any:
    """An argument of the model as its forward is followed with: the value that a leaf has.

    Raises TaskgradError if it is not on the driver yet.
    """
    if isinstance(argument, Leaf):
        return argument.value if argument.needs_grad else argument.sent()
    lazy = next((leaf for leaf in flatten(argument)[0] if is_lazy(leaf)), None)
    if lazy is not None:
        what = lazy.label if isinstance(lazy, Node) else f"a {type(lazy).__name__}"
        raise TaskgradError(
            "the forward of this model is followed on the driver, which needs its inputs there, "
            f"and {what} is on a worker: collect it first"
        )
    return argument
