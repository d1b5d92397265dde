"""What DaggerFlux.jl promises, and ResNet-50, to plain torch's bits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import taskgrad as tg
from helpers import assert_same, assert_vjp_equals_torch, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_identity_layers_pull_ones_back(client):
    chain = tg.GraphChain(nn.Sequential(*[nn.Identity() for _ in range(4)]), client=client)
    y, back = tg.vjp(chain, torch.zeros(3, 3))
    assert repr(y) == "Thunk[4](Identity, (Thunk[3](Identity, ...),))"
    grads, gx = back(torch.ones(3, 3))
    assert grads == {}
    assert_same(tg.collect(gx), torch.ones(3, 3))


@pytest.mark.parametrize("placement", [[0, 0], [0, 1], [1, 0]])
def test_two_linears_equal_torch(client, placement):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=client, placement=placement)
    assert_vjp_equals_torch(chain, model, torch.randn(4, 2))


@pytest.mark.long
def test_resnet50_equals_torch(client):
    from resnet import resnet

    torch.manual_seed(0)
    model = resnet(50, n_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    chain = tg.GraphChain(model, client=client)
    assert len(set(chain.placement.column("worker"))) == 2
    x = torch.randn(2, 3, 224, 224)
    plain = copy.deepcopy(model)
    leaf = x.clone().requires_grad_()
    out = plain(leaf)
    out.backward(torch.ones_like(out))
    y, back = tg.vjp(chain, x)
    value, (grads, gx) = tg.collect((y, back(torch.ones(2, 1000))))
    assert_same(value.detach(), out.detach(), "output")
    assert_same(gx, leaf.grad, "input")
    for name, parameter in plain.named_parameters():
        assert_same(grads[name], parameter.grad, name)
    for name, value in chain.state_dict().items():
        assert_same(value, plain.state_dict()[name], name)


@pytest.mark.parametrize("placement", [[0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], None])
def test_parallel_chain_equals_torch(client, placement):
    model = nn.Sequential(
        nn.Linear(3, 4),
        tg.Parallel(torch.add, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    chain = tg.GraphChain(model, client=client, placement=placement)
    assert [row.layer for row in chain.placement] == [
        "0",
        "1.branches.0.0",
        "1.branches.0.1",
        "1.branches.1",
        "1.connection",
        "2",
    ]
    assert_vjp_equals_torch(chain, model, torch.randn(5, 3))


def test_parallel_at_the_start_and_nested(client):
    model = nn.Sequential(
        tg.Parallel(
            torch.mul,
            nn.Linear(3, 4),
            nn.Sequential(tg.Parallel(torch.sub, nn.Linear(3, 4), nn.Linear(3, 4)), nn.Tanh()),
        )
    )
    chain = tg.GraphChain(model, client=client, placement="round_robin")
    assert_vjp_equals_torch(chain, model, torch.randn(5, 3))


def test_skip_over_two_workers_equals_torch(client):
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), tg.Parallel(torch.add, nn.Identity(), block), nn.Flatten()
    )
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1, 1, 1, 0, 1])
    assert_vjp_equals_torch(chain, model, torch.randn(2, 1, 8, 8))


def test_parallel_is_a_plain_module_too():
    block = tg.Parallel(torch.add, nn.Identity(), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    assert_same(block(x), x + block.branches[1](x))
    out, grads, _ = reference(block, x)
    assert set(grads) == {"branches.1.weight", "branches.1.bias"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((3, nn.Identity()), "callable"), ((torch.add,), "branch"), ((torch.add, 4), "branch 0")],
)
def test_parallel_refuses(arguments, match):
    with pytest.raises((TypeError, ValueError), match=match):
        tg.Parallel(*arguments)


def test_skips_beside_several_branches_are_summed_in_torchs_order(client):
    def join(*parts):
        return torch.cat(parts, -1)

    inner = tg.Parallel(torch.mul, nn.Linear(6, 3), nn.Linear(6, 3))
    branch = nn.Sequential(nn.Linear(6, 6), nn.ELU(inplace=True))
    model = nn.Sequential(
        nn.Linear(6, 6), tg.Parallel(join, nn.Identity(), branch, inner), nn.Linear(15, 2)
    )
    for placement in (None, "round_robin"):
        chain = tg.GraphChain(model, client=client, placement=placement)
        assert_vjp_equals_torch(chain, model, torch.randn(64, 6))
    start = nn.Sequential(tg.Parallel(join, nn.Identity(), nn.Linear(6, 2), nn.Linear(6, 2)))
    chain = tg.GraphChain(start, client=client, placement="round_robin")
    assert_vjp_equals_torch(chain, start, torch.randn(64, 6))
