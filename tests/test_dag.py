"""Reverse mode over any graph of calls: each shape of graph against plain torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import keys_of
from helpers import assert_same, assert_vjp_equals_torch


def both(f, g, *xs):
    """(value, input gradients) of lazy f and plain g, with cotangents of ones."""
    y, back = tg.vjp(f, *xs)
    value = tg.collect(y).detach()
    _, *ours = back(torch.ones_like(value))
    leaves = [x.clone().requires_grad_() for x in xs]
    out = g(*leaves)
    out.backward(torch.ones_like(out))
    assert_same(value, out.detach(), "value")
    for mine, leaf in zip(tg.collect(ours), leaves, strict=True):
        assert_same(mine, leaf.grad, "gradient")


def test_fan_out_sums_in_torchs_order(client):
    def lazy(x):
        h = tg.spawn(torch.exp, x, worker=0)
        a = tg.spawn(torch.sin, h, worker=1)
        b = tg.spawn(torch.cos, h, worker=0)
        c = tg.spawn(torch.tanh, h, worker=1)
        d = tg.spawn(torch.mul, h, 1 / 3)
        return a + b + c + d

    def plain(x):
        h = torch.exp(x)
        return torch.sin(h) + torch.cos(h) + torch.tanh(h) + torch.mul(h, 1 / 3)

    both(lazy, plain, torch.randn(1000))


def test_leaf_used_three_times(client):
    both(
        lambda x: (
            tg.spawn(torch.sin, x, worker=0)
            + tg.spawn(torch.exp, x, worker=1)
            + tg.spawn(torch.tanh, x, worker=0)
        ),
        lambda x: torch.sin(x) + torch.exp(x) + torch.tanh(x),
        torch.randn(1000),
    )


def test_same_value_twice_in_one_call(client):
    both(lambda x: tg.spawn(torch.mul, x, x), lambda x: x * x, torch.randn(10))


def test_operators_and_torch_functions_of_thunks(client):
    both(
        lambda x, y: (2 / torch.exp(x)) ** 2 - y[0] * 3,
        lambda x, y: (2 / torch.exp(x)) ** 2 - y[0] * 3,
        torch.randn(4),
        torch.randn(2, 4),
    )


def test_some_outputs_get_a_cotangent(client):
    def split(x):
        return {"a": x.sin(), "b": x.cos(), "n": 7, "nothing": None, "i": x.argmax()}

    x = torch.randn(6)
    y, back = tg.vjp(lambda x: tg.spawn(split, x), x)
    _, gx = back({"a": None, "b": torch.ones(6), "n": None, "nothing": None, "i": None})
    value = tg.collect(y)
    assert value["n"] == 7
    assert value["nothing"] is None
    assert value["i"].dtype == torch.int64
    assert_same(tg.collect(gx), -x.sin())


def test_several_thunks_as_output(client):
    x = torch.randn(6)
    y, back = tg.vjp(lambda x: (tg.spawn(torch.sin, x), [tg.spawn(torch.cos, x)]), x)
    _, gx = back((None, [torch.ones(6)]), retain_graph=True)
    assert_same(tg.collect(gx), -x.sin())
    _, gx = back((torch.ones(6), [torch.ones(6)]))
    assert torch.allclose(tg.collect(gx), x.cos() - x.sin())


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor
    label: str


def swap(pair: Pair) -> Pair:
    return Pair(pair.right * 2, pair.left * 3, pair.label + "!")


def total(pair: Pair) -> torch.Tensor:
    return (pair.left + pair.right).sum()


def test_dataclasses_cross_workers(client):
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    swapped = tg.spawn(swap, Pair(a, b, "x"), worker=0)
    assert tg.collect(swapped).label == "x!"
    out = tg.collect(tg.spawn(total, swapped, worker=1))
    out.backward()
    assert_same(a.grad, torch.full((3,), 3.0))
    assert_same(b.grad, torch.full((3,), 2.0))


def test_integer_inputs_get_no_gradient(client):
    table = torch.randn(5, 2)
    y, back = tg.vjp(lambda t, i: tg.spawn(F.embedding, i, t), table, torch.tensor([1, 3]))
    _, gt, gi = back(torch.ones(2, 2))
    assert gi is None
    assert tg.collect(gt).sum() == 4


def test_a_branch_without_gradient(client):
    """The value is used by a call that is not differentiable, whose result is used too."""
    x = torch.randn(4, 3, requires_grad=True)
    h = tg.spawn(torch.exp, x)
    best = tg.spawn(torch.argmax, h, dim=1)
    tg.spawn(F.cross_entropy, h, best).backward()
    z = x.detach().clone().requires_grad_()
    e = torch.exp(z)
    F.cross_entropy(e, e.argmax(1)).backward()
    assert_same(x.grad, z.grad)


@pytest.mark.parametrize("frozen", [["0"], ["0", "1"], ["2"], ["1"]])
def test_frozen_layers(client, frozen):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    assert_vjp_equals_torch(chain, model, torch.randn(4, 3))


def test_backward_stops_below_the_first_trainable_layer(client):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    before = keys_of(client, "backward")
    tg.collect(chain(torch.randn(4, 3))).sum().backward()
    assert [key.partition("-")[0] for key in keys_of(client, "backward") - before] == ["backward:2"]
    assert set(tg.collect(chain.grads())) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("placement", [[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
def test_layer_used_twice(client, placement):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    chain = tg.GraphChain(model, client=client, placement=placement)
    assert_vjp_equals_torch(chain, model, torch.randn(4, 3))


@pytest.mark.parametrize("placement", [[0, 0, 0], [0, 1, 1], [1, 0, 0]])
def test_tied_parameters(client, placement):
    model = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 7, bias=False))
    model[2].weight = model[0].weight
    chain = tg.GraphChain(model, client=client, placement=placement)
    ids = torch.randint(0, 7, (4, 5))
    target = torch.randint(0, 7, (20,))
    y = chain(ids)
    for _ in range(2):  # the second time adds to gradients that are there
        loss = F.cross_entropy(tg.collect(chain(ids)).flatten(0, 1), target)
        loss.backward()
        F.cross_entropy(model(ids).flatten(0, 1), target).backward()
    grads = tg.collect(chain.grads())
    assert list(grads) == ["0.weight"]
    assert_same(grads["0.weight"], model[0].weight.grad)
    back = chain.to_module()
    assert back[0].weight is back[2].weight
    assert y is not None


class Everything(nn.Module):
    """Several outputs, an integer, None, a value that is not used, an in-place write."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        h = self.inner(x)
        h.relu_()
        return {"h": h, "n": h.argmax(1), "none": None, "detached": h.detach() * 2}


class Use(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, d):
        assert d["none"] is None
        return (d["h"] * self.scale).add_(1) + d["detached"] + F.one_hot(d["n"], 3)


@pytest.mark.parametrize("placement", [[0, 1, 0], [1, 1, 1]])
def test_a_net_with_everything(client, placement):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), Everything(), Use())
    chain = tg.GraphChain(model, client=client, placement=placement)
    assert_vjp_equals_torch(chain, model, torch.randn(5, 4))
    assert chain.state_dict()["1.count"] == 1


def test_in_place_layers_at_the_start_of_a_stage(client):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    x = torch.randn(4, 3)
    assert_vjp_equals_torch(chain, model, x)
    first = chain(x)
    tg.collect(first)


def test_in_place_layer_does_not_write_into_another_callers_value(client):
    """Both relu_ and the identity read the one value h, on one worker."""
    h = tg.spawn(torch.neg, torch.ones(4), worker=0)
    relu = tg.spawn(torch.relu_, h, worker=0)
    tg.collect(relu)
    assert_same(tg.collect(h), -torch.ones(4))
    assert_same(tg.collect(tg.spawn(torch.clone, h, worker=0)), -torch.ones(4))


def test_back_twice(client):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    chain = tg.GraphChain(model, client=client)
    y, back = tg.vjp(chain, torch.randn(4, 3))
    first = tg.collect(back(torch.ones(4, 3), retain_graph=True))
    second = tg.collect(back(torch.ones(4, 3)))
    assert_same(first[1], second[1])
    with pytest.raises(tg.TapeError, match="a second time"):
        back(torch.ones(4, 3))


def test_vjp_of_a_module_names_its_parameters(client):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    plain = copy.deepcopy(model)
    y, back = tg.vjp(model, x)
    grads, gx = back(torch.ones(6, 1))
    value, grads, gx = tg.collect((y, grads, gx))
    leaf = x.clone().requires_grad_()
    out = plain(leaf)
    out.backward(torch.ones(6, 1))
    assert_same(value.detach(), out.detach())
    assert_same(gx, leaf.grad)
    assert set(grads) == {n for n, _ in plain.named_parameters()}
    for name, p in plain.named_parameters():
        assert_same(grads[name], p.grad, name)
    assert_same(model[1].running_mean, plain[1].running_mean, "the module's own buffer")
    assert model[1].num_batches_tracked == 1


def test_vjp_of_a_function_with_two_chains(client):
    a = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    b = tg.GraphChain(nn.Sequential(nn.Linear(2, 1)), client=client)
    _, back = tg.vjp(lambda x: b(a(x)) * 2, torch.randn(3, 2))
    grads, _ = back(torch.ones(3, 1))
    assert set(grads) == {
        "Sequential.0.weight",
        "Sequential.0.bias",
        "Sequential_1.0.weight",
        "Sequential_1.0.bias",
    }
    assert_same(tg.collect(grads["Sequential_1.0.bias"]), torch.tensor([6.0]))


def test_vjp_with_a_thunk_as_primal_stops_there(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    h = chain(torch.randn(3, 2))
    _, back = tg.vjp(lambda h: tg.spawn(torch.exp, h), h)
    grads, gh = back(torch.ones(3, 2))
    assert grads == {}
    assert_same(tg.collect(gh), tg.collect(h).detach().exp())


def test_vjp_takes_pytrees(client):
    x = {"a": torch.randn(3), "b": (torch.randn(3), 4)}
    _, back = tg.vjp(lambda d: tg.spawn(torch.mul, d["a"], d["b"][0]) * d["b"][1], x)
    _, gx = back(torch.ones(3))
    gx = tg.collect(gx)
    assert_same(gx["a"], x["b"][0] * 4)
    assert_same(gx["b"][0], x["a"] * 4)
    assert gx["b"][1] is None


def test_closed_over_tensors_get_gradients(client):
    w = torch.randn(3, requires_grad=True)
    layer = nn.Linear(3, 1)

    def f(x):
        return layer(x * w).sum()

    tg.spawn(f, torch.ones(2, 3)).backward()
    ours = [w.grad, layer.weight.grad, layer.bias.grad]
    w.grad = layer.weight.grad = layer.bias.grad = None
    f(torch.ones(2, 3)).backward()
    for a, b in zip(ours, [w.grad, layer.weight.grad, layer.bias.grad], strict=True):
        assert_same(a, b)


def test_bfloat16_and_complex_cross_workers(client):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(torch.bfloat16)
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    assert_vjp_equals_torch(chain, model, torch.randn(4, 3).to(torch.bfloat16))
    both(
        lambda x: tg.spawn(torch.real, tg.spawn(torch.fft.fft, x, worker=0), worker=1),
        lambda x: torch.real(torch.fft.fft(x)),
        torch.randn(8),
    )


def test_lstm_and_transformer_chains(client):
    class Last(nn.Module):
        def forward(self, out):
            return out[0][:, -1]

    model = nn.Sequential(nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), Last())
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    assert_vjp_equals_torch(chain, model, torch.randint(0, 11, (3, 5)))
    model = nn.Sequential(
        nn.Linear(8, 16),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        nn.Linear(16, 4),
    )
    chain = tg.GraphChain(model, client=client)
    assert_vjp_equals_torch(chain, model, torch.randn(2, 6, 8))


def test_autocast_of_the_driver_holds_on_the_workers(client):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0])
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy = chain(x)
        out = model(x)
    ours = tg.collect(lazy)
    assert ours.dtype == out.dtype == torch.bfloat16
    assert_same(ours.detach(), out.detach())
    ours.sum().backward()
    grad, x.grad = x.grad, None
    out.sum().backward()
    assert_same(grad, x.grad)
    for name, g in tg.collect(chain.grads()).items():
        assert_same(g, model.get_parameter(name).grad, name)


def test_a_net_of_chains_with_skips_over_workers(client):
    """A small U-Net: encoder values are used again by the decoder, on other workers."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 4), (4, 8), (8, 4), (8, 4))]
    tail = nn.Conv2d(5, 1, 1)

    def unet(enc1, enc2, dec2, dec1, tail, x):
        a = torch.relu(enc1(x))
        b = torch.relu(enc2(F.max_pool2d(a, 2)))
        u = F.interpolate(dec2(b), scale_factor=2)
        return tail(torch.cat([dec1(torch.cat([u, a], 1)), x], dim=1))

    chains = [
        tg.GraphChain(m, client=client, placement=[i % 2]) for i, m in enumerate([*parts, tail])
    ]
    x = torch.randn(2, 1, 8, 8)
    y, back = tg.vjp(lambda x: unet(*chains, x), x)
    value, (grads, gx) = tg.collect((y, back(torch.ones(2, 1, 8, 8))))
    leaf = x.clone().requires_grad_()
    out = unet(*parts, tail, leaf)
    out.backward(torch.ones_like(out))
    assert_same(value.detach(), out.detach())
    assert_same(gx, leaf.grad)
    theirs = [p.grad for m in [*parts, tail] for p in m.parameters()]
    for a, b in zip(grads.values(), theirs, strict=True):
        assert_same(a, b)


def test_sparse_gradients(client):
    model = nn.Sequential(nn.Embedding(50, 3, sparse=True), nn.Linear(3, 2))
    chain = tg.GraphChain(model, client=client, placement=[0, 1])
    ids = torch.tensor([[1, 2], [2, 40]])
    for _ in range(2):
        tg.spawn(torch.sum, chain(ids)).backward()
        model(ids).sum().backward()
    ours = tg.collect(chain.grads())["0.weight"]
    assert ours.is_sparse
    assert_same(ours.to_dense(), model[0].weight.grad.to_dense())


def plain_grads(run, *modules):
    for m in modules:
        m.zero_grad()
    run().sum().backward()
    return [[p.grad.clone() for p in m.parameters()] for m in modules]


def test_vjp_through_several_spawned_modules_of_one_kind(client):
    a, b, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(4, 2)
    theirs = [g for grads in plain_grads(lambda: b(a(x)), a, b) for g in grads]
    for f in (
        lambda x: tg.spawn(b, tg.spawn(a, x)),
        lambda x: tg.spawn(lambda x: b(a(x)), x),
    ):
        _, back = tg.vjp(f, x)
        grads, _ = back(torch.ones(4, 2))
        assert len(grads) == 4
        ours = tg.collect(list(grads.values()))
        for theirs_too in theirs:
            assert any(torch.equal(theirs_too, g) for g in ours)


def test_vjp_through_one_spawned_module_used_twice(client):
    a, x = nn.Linear(2, 2), torch.randn(4, 2)
    _, back = tg.vjp(lambda x: tg.spawn(a, tg.spawn(a, x, worker=0), worker=1), x)
    grads, _ = back(torch.ones(4, 2))
    assert list(grads) == ["weight", "bias"]
    for ours, theirs in zip(grads.values(), plain_grads(lambda: a(a(x)), a)[0], strict=True):
        assert_same(tg.collect(ours), theirs)


def test_backward_writes_a_spawned_modules_buffers_back(client):
    ours, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    theirs = copy.deepcopy(ours)
    tg.spawn(torch.sum, tg.spawn(ours, x)).backward()
    theirs(x).sum().backward()
    assert_same(ours.running_mean, theirs.running_mean)
    assert_same(ours.weight.grad, theirs.weight.grad)


def test_a_batch_norm_used_twice_has_one_state(client):
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    model = nn.Sequential(norm, nn.Linear(2, 2), nn.Linear(2, 2), norm)
    for placement in (None, "round_robin"):
        chain = tg.GraphChain(model, client=client, placement=placement)
        plain = copy.deepcopy(model)
        tg.collect(chain(x))
        plain(x)
        for name, value in plain.state_dict().items():
            assert_same(chain.state_dict()[name], value, name)
    with pytest.raises(tg.PlacementError, match="'3' shares buffers.*one worker"):
        tg.GraphChain(model, client=client, placement=[0, 0, 1, 1])
