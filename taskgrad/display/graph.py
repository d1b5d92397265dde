"""Graphs of calls for people: the nested text, a picture coloured by worker, HTML for notebooks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import External, Leaf, Primal
from taskgrad.graph.nodes import Element, Node, ancestors, whole
from taskgrad.graph.pytree import describe
from taskgrad.worker_names import WorkerName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Nesting that a repr shows before it says "...".
_DEPTH = 2
_MAX_DRAWN = 60
_ROW, _ARC, _PAD, _LEGEND = 0.6, 0.6, 0.03, 0.3  # inches
COLOURS = ("#4c9be8", "#f2a541", "#57b894", "#d96c75", "#9b7fd1", "#8c8c8c", "#c9b037", "#5fc4cf")


def nested(node: Node) -> str:
    """A call as DaggerFlux shows it: ``Thunk[2](Linear, (Thunk[1](ReLU, (float32[4, 2],)),))``.

    The number counts the calls behind it, itself included, in the order in which they run.
    """
    return _nested(node, _numbers(node), len(_steps(node)), _DEPTH)


def _numbers(node: Node) -> dict[int, int]:
    """For each node: the number of its last step."""
    total, numbers = 0, {}
    for n in sorted(ancestors([node]), key=lambda n: n.order):
        if not isinstance(n, Leaf | External | Primal) and not _is_output(n):
            total += len(_steps(n))
            numbers[id(n)] = total
    return numbers


def _is_output(node: Node) -> bool:
    """True for one of several outputs of a call, which is shown as the call."""
    return isinstance(node, Element) and isinstance(node.source, Call)


def _steps(node: Node) -> Sequence[str]:
    if isinstance(node, Call):
        return [kind for _, _, kind in node.spec.steps]
    return [node.key.partition("-")[0]]


def _nested(node: Node, numbers: dict[int, int], step: int, depth: int) -> str:
    if isinstance(node, Primal) or _is_output(node):
        source = node.source if isinstance(node, Primal) else whole(node)
        return _nested(source, numbers, len(_steps(source)), depth)
    if isinstance(node, Leaf):
        return describe(node.value)
    if isinstance(node, External):
        return f"Delayed({node.key.partition('-')[0]})"
    if depth == 0:
        return "..."
    steps = _steps(node)
    number = numbers.get(id(node), len(steps)) - (len(steps) - step)
    if step > 1:
        inner = [_nested(node, numbers, step - 1, depth - 1)]
    else:
        inner = [_nested(i, numbers, len(_steps(i)), depth - 1) for i in _shown_inputs(node)]
    if inner == ["..."]:
        return f"Thunk[{number}]({steps[step - 1]}, ...)"
    listed = ", ".join(inner) + ("," if len(inner) == 1 else "")
    return f"Thunk[{number}]({steps[step - 1]}, ({listed}))"


def _shown_inputs(node: Node) -> Sequence[Node]:
    """Inputs but for the tensors of a function itself, which are no arguments."""
    if isinstance(node, Call):
        return [n for i, n in enumerate(node.inputs) if i not in node.spec.tensor_slots]
    return node.inputs


class CallGraph(NamedTuple):
    """Layers and calls as a graph: (label, worker; None on the driver) by key, and the edges."""

    nodes: dict[str, tuple[str, str | None]]
    edges: list[tuple[str, str]]


def call_graph(
    outputs: Iterable[Node], worker_of: Callable[[Node], str | None] | None = None
) -> CallGraph:
    """The graph behind these outputs; `worker_of` returns the worker assigned to a node."""
    graph = CallGraph({}, [])
    ends: dict[Node, str] = {}
    for node in sorted(ancestors(outputs), key=lambda n: n.order):
        if isinstance(node, Primal) or _is_output(node):
            ends[node] = ends[node.source if isinstance(node, Primal) else whole(node)]
            continue
        if isinstance(node, Leaf):
            names = [describe(node.value)]
        elif isinstance(node, Call):
            steps = node.spec.steps
            names = [f"{name}\n{kind}" if name != kind else kind for _, name, kind in steps]
        else:
            names = [node.key.partition("-")[0]]
        worker = None
        if not isinstance(node, Leaf | External):
            worker = node.worker if worker_of is None else worker_of(node)
        keys = [f"{node.key}/{i}" for i in range(len(names))]
        graph.nodes.update({key: (label, worker) for key, label in zip(keys, names, strict=True)})
        graph.edges.extend(pairwise(keys))
        graph.edges.extend((ends[given], keys[0]) for given in _shown_inputs(node))
        ends[node] = keys[-1]
    return graph


def svg(calls: CallGraph, names: Mapping[str, Any]) -> str:
    """The graph drawn as SVG; "" if it is large, or without the extra viz."""
    if not calls.nodes or len(calls.nodes) > _MAX_DRAWN:
        return ""
    try:
        figure = drawn(calls, names)
    except ImportError:
        return ""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    text = file.getvalue()
    return text[text.index("<svg") :]


def drawn(calls: CallGraph, names: Mapping[str, Any]) -> Figure:
    """The graph drawn from left to right, a colour for each worker.

    Raises ImportError without networkx and matplotlib, the extra viz.
    """
    import networkx as nx
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, Patch

    class Drawing(Figure):
        """Shown by notebooks, also where pyplot has not been imported."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, bbox_inches="tight")
            return file.getvalue()

    graph = nx.DiGraph()
    graph.add_nodes_from(calls.nodes)
    graph.add_edges_from(calls.edges)
    places, columns, right, tall = {}, {}, 0.0, 1  # in inches
    for column, keys in enumerate(nx.topological_generations(graph)):
        lines = [line for key in keys for line in calls.nodes[key][0].splitlines()]
        width = 0.45 + 0.062 * max(map(len, lines), default=0)
        for i, key in enumerate(keys):
            places[key] = right + width / 2, _ROW * ((len(keys) - 1) / 2 - i)
            columns[key] = column
        right, tall = right + width, max(tall, len(keys))
    over = {(a, b) for a, b in graph.edges if columns[b] - columns[a] > 1}
    high = _ROW * (tall - 1) / 2 + (_ARC if over else 0.4)
    figure = Drawing(figsize=(max(3.0, right), 2 * high + _LEGEND))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, right), ylim=(-high - _LEGEND, high))
    workers = sorted({worker for _, worker in calls.nodes.values() if worker})
    colour = {w: COLOURS[i % len(COLOURS)] for i, w in enumerate(workers)}
    texts = {}
    for key, (x, y) in places.items():
        label, worker = calls.nodes[key]
        text = axes.text(
            *(x, y, label),
            ha="center",
            va="center",
            fontsize=7,
            bbox={"boxstyle": "round", "fc": colour.get(worker or "", "#eeeeee"), "ec": "#666666"},
        )
        texts[key] = text
    inches = axes.transData.inverted()
    half = {k: inches.transform_bbox(t.get_window_extent()).width / 2 for k, t in texts.items()}
    for source, user in graph.edges:
        (x0, y0), (x1, y1) = places[source], places[user]
        rad = 0.0
        if (source, user) in over:  # around the boxes between
            rad = min(0.25, 2 * _ARC / (x1 - x0)) * (1 if y0 < y1 else -1)
        arrow = FancyArrowPatch(
            *((x0 + half[source] + _PAD, y0), (x1 - half[user] - _PAD, y1)),
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={rad}",
            shrinkA=0,
            shrinkB=0,
            mutation_scale=8,
            color="#999999",
            zorder=1,
        )
        axes.add_patch(arrow)
    if workers:
        handles = [Patch(color=colour[w], label=WorkerName(w, names.get(w))) for w in workers]
        figure.legend(handles=handles, loc="lower center", ncols=len(workers), fontsize=7)
    return figure


def html(title: str, graph: CallGraph, names: Mapping[str, Any], table: str = "") -> str:
    """A heading, the drawing, and a table of layers or of calls.

    `names` has the names of workers by their addresses.
    """
    drawing = svg(graph, names)
    if not drawing and not table:
        workers = [w and str(WorkerName(w, names.get(w))) for _, w in graph.nodes.values()]
        labels = [label for label, _ in graph.nodes.values()]
        rows = [
            f"<tr><td>{escape(label)}</td><td>{escape(worker or 'driver')}</td></tr>"
            for label, worker in zip(labels, workers, strict=True)
        ]
        table = f"<table><tr><th>call</th><th>worker</th></tr>{''.join(rows[-_MAX_DRAWN:])}</table>"
    return f"<div><code>{escape(title)}</code>{drawing}{table}</div>"
