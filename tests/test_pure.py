"""The pure parts: pytrees, packing, partition, costs, the adjoint as data."""

from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from taskgrad.graph import pack
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.calls import Call
from taskgrad.graph.layers import flatten_model
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Sum
from taskgrad.graph.pytree import flatten, map_leaves
from taskgrad.plan.costs import layer_costs
from taskgrad.plan.placement import contiguous, round_robin, there_and_back

Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Box:
    inside: object
    label: str = ""


leaf = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.floats(allow_nan=False))
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Box, inner, st.text(max_size=2)),
    ),
    max_leaves=12,
)


@given(trees)
def test_pytrees_build_again(tree):
    leaves, structure = flatten(tree)
    assert structure.build(leaves) == tree
    again, same = flatten(tree)
    assert again == leaves
    assert same == structure
    assert map_leaves(lambda x: x, tree) == tree


def test_structures_differ():
    ones = torch.ones(1)
    kinds = [ones, [ones], (ones,), {"a": ones}, {"b": ones}, Point(ones, 1), Box(ones), [[ones]]]
    for a, b in itertools.combinations([flatten(k)[1] for k in kinds], 2):
        assert a != b


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 5))
def test_contiguous_is_the_best_cut(costs, k):
    placed = contiguous(costs, k)
    runs = min(k, len(costs))
    assert placed[0] == 0
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(placed))
    assert placed[-1] == runs - 1

    def worst(cuts):
        edges = [0, *cuts, len(costs)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

    best = min(worst(c) for c in itertools.combinations(range(1, len(costs)), runs - 1))
    ours = max(sum(c for c, p in zip(costs, placed, strict=True) if p == r) for r in range(runs))
    assert ours == best


def test_round_robin():
    assert round_robin(5, 2) == [0, 1, 0, 1, 0]


def test_there_and_back():
    assert there_and_back(6) == [0, 1, 2, 2, 1, 0]
    assert there_and_back(5) == [0, 1, 2, 1, 0]  # fewer layers than two a worker
    assert there_and_back(1) == [0]


def test_pack_keeps_ties_and_takes_tensors_out():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))
    model[1].weight = model[0].weight
    packed = pack.pack(model)
    assert len(packed.data) < 10_000
    assert len(packed.tensors) == 3
    assert packed.modules == [model]
    back = pack.unpack(packed.data, [t.clone() for t in packed.tensors], own=True)
    assert back[1].weight is back[0].weight
    assert isinstance(back[0].weight, nn.Parameter)
    assert torch.equal(back[0].weight, model[0].weight)


def test_pack_finds_what_a_function_closes_over():
    w, layer = torch.ones(2, requires_grad=True), nn.Linear(2, 2)
    packed = pack.pack(lambda x, scale=w: layer(x) * scale)
    assert {id(t) for t in packed.tensors} == {id(w), id(layer.weight), id(layer.bias)}
    assert packed.modules == [layer]


class Block(nn.Module):
    """Must not run on the driver."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x):
        raise AssertionError("a user's forward ran on the driver")


def test_costs_count_parameters_and_activations_and_run_no_user_code():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Block(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 62 * 62, 10)
    )
    state = torch.get_rng_state()
    flat = flatten_model(model)
    costs = layer_costs(flat.path, flat.modules)
    plane = 8 * 8 * 62 * 62 * 4  # batch, channels, height, width, bytes
    assert costs[0].total >= 8 * 3 * 64 * 64 * 4
    assert costs[1].total >= 2 * plane
    assert costs[4].total >= 8 * 62 * 62 * 10 * 4
    assert torch.equal(state, torch.get_rng_state())


def test_adjoint_sums_newest_first():
    x = Leaf(torch.ones(2, requires_grad=True))

    def call(*inputs):
        return Call(title="f", steps=((0, "f", "f"),), inputs=inputs, template=b"", worker="w")

    h = call(x)
    users = [call(h), call(h), call(h)]
    top = call(*users)
    found = adjoint([(top, None)])
    assert [p.call for p in found.pullbacks] == [top, *reversed(users), h]
    assert [c.call for c in found.pullbacks[-1].cotangents] == list(reversed(users))
    assert found.leaf_grad(x) is found.pullbacks[-1]
    with pytest.raises(tg.TapeError):
        adjoint([(top, None)])


def test_adjoint_leaves_out_what_needs_no_gradient():
    x = Leaf(torch.ones(2, requires_grad=True))
    n = Leaf(torch.ones(2))

    def call(*inputs):
        return Call(title="f", steps=((0, "f", "f"),), inputs=inputs, template=b"", worker="w")

    plain = call(n)
    top = call(call(x), plain)
    found = adjoint([(top, None)])
    assert plain not in [p.call for p in found.pullbacks]
    assert found.pullbacks[0].wanted == (0,)
    twice = call(call(x), call(x))
    assert isinstance(adjoint([(twice, None)]).leaf_grad(x), Sum)
