"""Cutting the graph of a model into stages: pure functions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import taskgrad as tg
from taskgrad.display.layer_graph import layer_call_graph, to_networkx
from taskgrad.graph.layer_graph import FUNCTION, GraphStep, LayerGraph, Value
from taskgrad.graph.layers import Layer
from taskgrad.graph.torch_settings import STARTING
from taskgrad.plan.graph_stages import GraphStage, graph_stages


def graph_of(
    *steps: tuple[int, tuple[int, ...]],
    inputs: int = 1,
    output: tuple[int, ...] | None = None,
    reads: frozenset[int] = frozenset(),
    sizes: dict[int, int] | None = None,
    together: tuple[tuple[int, ...], ...] = (),
) -> LayerGraph:
    """A graph of steps (layer, values taken), each of which gives one value; the output is the last
    one's."""
    values = [Value(None, (4,), torch.float32, False)] * inputs
    made = []
    for number, (layer, takes) in enumerate(steps):
        target = b"" if layer == FUNCTION else "weight" if number in reads else None
        name = f"f{number}" if layer == FUNCTION else f"l{layer}"
        result = ((0, len(values)),)
        made.append(GraphStep(layer, name, "K", target, b"", takes, result, STARTING))
        shape = ((sizes or {}).get(number, 4),)
        values.append(Value(number, shape, torch.float32, True))
    end = (len(values) - 1,) if output is None else output
    return LayerGraph(tuple(values), inputs, tuple(made), b"", end, together)


def cut(graph: LayerGraph, workers: str, **kwargs: object) -> list[tuple[str, tuple[int, ...]]]:
    return [(s.worker, s.steps) for s in graph_stages(graph, list(workers), **kwargs)]


F = FUNCTION


def test_a_row_is_a_stage_for_each_run_of_layers_on_one_worker() -> None:
    row = graph_of((0, (0,)), (1, (1,)), (2, (2,)), (3, (3,)))
    assert cut(row, "aabb") == [("a", (0, 1)), ("b", (2, 3))]
    assert cut(row, "abab") == [("a", (0,)), ("b", (1,)), ("a", (2,)), ("b", (3,))]
    assert cut(row, "aabb", starts=frozenset({1})) == [("a", (0,)), ("a", (1,)), ("b", (2, 3))]


def test_a_function_runs_where_its_newest_value_is_made() -> None:
    skip = graph_of((0, (0,)), (1, (1,)), (F, (2, 1)), (2, (3,)))
    first, second, third = graph_stages(skip, list("aba"))
    assert (first.steps, second.steps, third.steps) == ((0,), (1, 2), (3,))
    assert first.outputs == (1,)  # once, though two steps of the next stage take it
    assert second.inputs == (1,)
    assert third.needs == (1,)


def test_a_function_runs_where_its_parameter_is_if_that_is_larger() -> None:
    steps = (0, (0,)), (1, (1,)), (0, ()), (F, (2, 3))
    reads = frozenset({2})
    large = graph_of(*steps, reads=reads, sizes={2: 100})
    assert cut(large, "ab") == [("a", (0,)), ("b", (1,)), ("a", (2, 3))]
    small = graph_of(*steps, reads=reads, sizes={2: 1})
    assert cut(small, "ab") == [("a", (0, 2)), ("b", (1, 3))]


def test_what_depends_on_parameters_alone_runs_in_each_stage_that_takes_it() -> None:
    # The weight of layer 0, and what a function makes of it, are used before and after layer 1.
    graph = graph_of(
        *((0, ()), (F, (1,)), (0, (0,)), (F, (3, 2)), (1, (4,)), (F, (5, 2))),
        reads=frozenset({0}),
        sizes={0: 100, 1: 100},
    )
    first, second, third = graph_stages(graph, list("ab"))
    assert [s.steps for s in (first, second, third)] == [(0, 1, 2, 3), (4,), (0, 1, 5)]
    assert third.inputs == (5,)
    assert first.outputs == (4,)


def test_a_function_stays_where_the_first_graph_had_it() -> None:
    steps = (0, (0,)), (1, (1,)), (0, ()), (F, (2, 3))
    known: dict[str, str] = {}
    large = graph_of(*steps, reads=frozenset({2}), sizes={2: 100})
    small = graph_of(*steps, reads=frozenset({2}), sizes={2: 1})
    assert cut(large, "ab", functions=known) == cut(small, "ab", functions=known)


def test_functions_of_inputs_run_where_their_first_user_is() -> None:
    masked = graph_of((0, (0,)), (F, (1,)), (F, (3,)), (1, (2, 4)), inputs=2)
    assert cut(masked, "ab") == [("a", (0,)), ("b", (1, 2, 3))]


def test_steps_that_the_output_does_not_need_are_left_out() -> None:
    dead = graph_of((0, (0,)), (1, (1,)), (2, (1,)), output=(1, 3))
    assert cut(dead, "aba") == [("a", (0, 2))]
    together = replace(dead, together=((0, 1),))
    with pytest.raises(tg.TaskgradError, match="keep_together="):
        cut(together, "aba")
    assert cut(together, "aaa") == [("a", (0, 1, 2))]


def test_what_writes_in_place_is_with_what_it_writes_into() -> None:
    # Layer 1 takes what layer 0 gives before the function writes into it with layer 1's result.
    written = graph_of((0, (0,)), (1, (1,)), (F, (1, 2)), together=((0, 2),))
    with pytest.raises(tg.TaskgradError, match=r"'l0', 'f2'.* in place .*keep_together="):
        cut(written, "ab")
    assert cut(written, "aa") == [("a", (0, 1, 2))]
    # Another stage takes the value as it is before it is written.
    early = graph_of((0, (0,)), (1, (1,)), (F, (1,)), (0, (2, 3)), together=((0, 2),))
    with pytest.raises(tg.TaskgradError, match="'l1'"):
        cut(early, "ab")


def test_the_last_stage_takes_what_others_give_of_the_output() -> None:
    towers = graph_of((0, (0,)), (1, (1,)), inputs=2, output=(2, 3, 0))
    a, b = graph_stages(towers, list("ab"))
    assert (a.outputs, a.inputs) == ((2,), (0,))
    assert (b.outputs, b.inputs, b.needs) == ((), (1, 2, 0), (0,))


def test_an_output_of_inputs_alone_is_a_stage() -> None:
    nothing = graph_of((0, (0,)), output=(0,))
    assert graph_stages(nothing, ["a"]) == (GraphStage("a", (), (0,), (), ()),)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[LayerGraph, list[str], frozenset[int]]:
    inputs, count = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    layers = draw(st.integers(1, 6))
    workers = draw(st.lists(st.sampled_from("abc"), min_size=layers, max_size=layers))
    steps = [
        (
            draw(st.sampled_from([F, *range(layers)])),
            tuple(draw(st.sets(st.integers(0, inputs + i - 1), min_size=1, max_size=3))),
        )
        for i in range(count)
    ]
    output = draw(st.sets(st.integers(0, inputs + count - 1), min_size=1, max_size=3))
    starts = draw(st.frozensets(st.integers(0, layers - 1), max_size=1))
    return graph_of(*steps, inputs=inputs, output=tuple(output)), workers, starts


@given(graphs())
def test_stages_can_run_in_order_and_have_what_they_need(
    case: tuple[LayerGraph, list[str], frozenset[int]],
) -> None:
    graph, workers, starts = case
    stages = graph_stages(graph, workers, starts=starts)
    there = set(range(graph.n_inputs))
    for i, stage in enumerate(stages):
        assert there.issuperset(stage.inputs)
        assert set(stage.needs) <= set(range(i))
        own = set(stage.inputs)
        for number in stage.steps:
            step = graph.steps[number]
            assert own.issuperset(step.inputs)
            own.update(step.given)
            if step.layer != F:
                assert workers[step.layer] == stage.worker
                assert step.layer not in starts or number == stage.steps[0]
        assert own.issuperset(stage.outputs)
        there.update(stage.outputs)
        assert list(stage.steps) == sorted(stage.steps)
    assert own.issuperset(graph.output_values)
    ran = [number for stage in stages for number in stage.steps]
    assert len(ran) == len(set(ran))
    needed = {graph.values[v].step for v in graph.output_values} - {None}
    assert needed <= set(ran)
    if not starts:  # two stages of a worker in a row would be one
        for before, after in pairwise(stages):
            assert before.worker != after.worker or any(
                i > stages.index(before) for i in after.needs
            )


def test_the_graph_as_networkx_and_as_a_drawing() -> None:
    graph = graph_of((0, (0,)), (1, (1,)), (F, (2, 1)))
    layers = [Layer(0, "down", "Linear"), Layer(1, "up", "Linear")]
    stages = graph_stages(graph, ["a", "b"])
    found = to_networkx(graph, layers, stages)
    assert list(found) == ["input 0", 0, 1, 2, "output"]
    assert found.nodes[1] == {
        "name": "l1",
        "kind": "K",
        "role": "layer",
        "layer": "up",
        "worker": "b",
        "stage": 1,
    }
    assert found.nodes[2]["role"] == "function"
    crossing = [(u, v) for u, v, crosses in found.edges(data="crosses") if crosses]
    assert crossing == [(0, 1), (0, 2)]
    drawn = layer_call_graph(graph, stages)
    assert drawn.nodes["1"] == ("l1\nK", "b")
    assert ("0", "2") in drawn.edges
