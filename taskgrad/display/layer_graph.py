"""The graph of a model's layers for people: a networkx graph, and a picture of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from taskgrad.display.graph import CallGraph
from taskgrad.graph.layer_graph import FUNCTION, GraphStep, LayerGraph
from taskgrad.graph.layers import Layer
from taskgrad.plan.graph_stages import GraphStage

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(
    graph: LayerGraph, layers: Sequence[Layer], stages: Sequence[GraphStage]
) -> nx.MultiDiGraph:
    """A model's graph as a networkx graph: nodes are what runs, edges are values.

    Nodes are the numbers of the graph's steps that run, from 0 on, in an order in which they can;
    ``"input 0"`` and so on for the inputs that are used; and ``"output"``. They have the attributes

    - ``name``: of a layer or parameter the model's own, of a function one of the graph's;
    - ``kind``: the class of a layer, the name of a function, ``"Parameter"``, ``"Buffer"``,
      ``"input"`` or ``"output"``;
    - ``role``: ``"layer"``, ``"function"``, ``"parameter"``, ``"input"`` or ``"output"``;
    - ``layer``: the name of the layer that it is or is a parameter of; None for others;
    - ``worker``: the address; None for inputs and the output, which are on the driver;
    - ``stage``: the number of its stage; None for inputs and the output.

    Each value is an edge from what gives it to each user; two values may go the same way. The key
    of an edge is the value's number. Edges have the attributes

    - ``value``: that number;
    - ``shape``, ``dtype``, ``nbytes``: of the tensor, when the model's forward was followed;
    - ``requires_grad``: True if a gradient comes back;
    - ``crosses``: True if it goes from one worker to another.

    Parameters
    ----------
    graph
        A graph of the model.
    layers
        Its layers.
    stages
        The stages of the graph, as `graph_stages` gives them.

    Raises
    ------
    ImportError
        There is no networkx: it is part of the extra viz.

    Examples
    --------
    >>> import torch
    >>> from taskgrad.graph.layer_graph import Value
    >>> from taskgrad.graph.torch_settings import STARTING
    >>> from taskgrad.plan.graph_stages import graph_stages
    >>> step = GraphStep(0, "up", "Linear", None, b"", (0,), ((0, 1),), STARTING)
    >>> values = Value(None, (4, 2), torch.float32, False), Value(0, (4, 3), torch.float32, True)
    >>> graph = LayerGraph(values, 1, (step,), b"", (1,))
    >>> found = to_networkx(graph, [Layer(0, "up", "Linear")], graph_stages(graph, ["tcp://a"]))
    >>> list(found.edges(data="shape"))
    [('input 0', 0, (4, 2)), (0, 'output', (4, 3))]
    >>> found.nodes[0]["name"], found.nodes[0]["worker"]
    ('up', 'tcp://a')
    """
    import networkx as nx

    stage_of: dict[int, int] = {}
    for i, stage in enumerate(stages):
        for number in stage.steps:
            stage_of.setdefault(number, i)
    found = nx.MultiDiGraph()
    for value in sorted({v for stage in stages for v in stage.inputs if v < graph.n_inputs}):
        found.add_node(f"input {value}", **_side(f"input {value}", "input"))
    for number in sorted(stage_of):
        step, i = graph.steps[number], stage_of[number]
        found.add_node(
            number,
            name=step.name,
            kind=step.kind,
            role=_role(step),
            layer=None if step.layer == FUNCTION else layers[step.layer].name,
            worker=stages[i].worker,
            stage=i,
        )
    found.add_node("output", **_side("output", "output"))
    for value, source, user in _edges(graph, stage_of):
        about = graph.values[value]
        ends = [found.nodes[node]["worker"] for node in (source, user)]
        found.add_edge(
            source,
            user,
            key=value,
            value=value,
            shape=about.shape,
            dtype=about.dtype,
            nbytes=about.nbytes,
            requires_grad=about.requires_grad,
            crosses=None not in ends and ends[0] != ends[1],
        )
    return found


def layer_call_graph(graph: LayerGraph, stages: Sequence[GraphStage]) -> CallGraph:
    """The graph in the form in which it is drawn, given its stages."""
    workers = {number: stage.worker for stage in stages for number in stage.steps}
    drawn = CallGraph({}, [])
    for value in sorted({v for stage in stages for v in stage.inputs if v < graph.n_inputs}):
        about = graph.values[value]
        shape = f"{str(about.dtype).removeprefix('torch.')}{list(about.shape)}"
        drawn.nodes[f"input {value}"] = shape, None
    for number in sorted(workers):
        step = graph.steps[number]
        alone = step.layer == FUNCTION or not step.name
        label = step.kind if alone else f"{step.name}\n{step.kind}"
        drawn.nodes[str(number)] = label, workers[number]
    drawn.nodes["output"] = "output", None
    edges = {(str(source), str(user)): None for _, source, user in _edges(graph, workers)}
    drawn.edges.extend(edges)
    return drawn


def _side(name: str, kind: str) -> dict[str, str | None]:
    return {"name": name, "kind": kind, "role": kind, "layer": None, "worker": None, "stage": None}


def _role(step: GraphStep) -> str:
    if step.layer == FUNCTION:
        return "function"
    return "layer" if step.target is None else "parameter"


def _edges(graph: LayerGraph, alive: Collection[int]) -> Iterator[tuple[int, int | str, int | str]]:
    """Each (value, what gives it, a user), for the steps that run."""
    takes: list[tuple[int | str, tuple[int, ...]]] = [
        (number, graph.steps[number].inputs) for number in sorted(alive)
    ]
    for user, values in [*takes, ("output", graph.output_values)]:
        for value in values:
            step = graph.values[value].step
            yield value, f"input {value}" if step is None else step, user
