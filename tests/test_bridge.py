"""The bridge: collected values are part of the driver's autograd graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def test_loss_on_the_driver(client, model):
    chain = tg.GraphChain(model, client=client)
    x, t = torch.randn(6, 3, requires_grad=True), torch.randint(0, 4, (6,))
    for _ in range(2):
        F.cross_entropy(tg.collect(chain(x)), t).backward()
    ours, x.grad = x.grad, None
    for _ in range(2):
        F.cross_entropy(model(x), t).backward()
    assert_same(ours, x.grad)
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)


def test_gradients_go_on_through_the_drivers_graph(client, model):
    chain = tg.GraphChain(model, client=client)
    w = torch.randn(3, requires_grad=True)
    x = torch.randn(6, 3)
    tg.collect(chain(x * w)).sum().backward()
    ours, w.grad = w.grad, None
    model(x * w).sum().backward()
    assert_same(ours, w.grad)


def test_autograd_grad_accumulates_nothing(client, model):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3, requires_grad=True)
    (ours,) = torch.autograd.grad(tg.collect(chain(x)).sum(), [x])
    (theirs,) = torch.autograd.grad(model(x).sum(), [x])
    assert_same(ours, theirs)
    assert x.grad is None
    assert set(tg.collect(chain.grads()).values()) == {None}


def test_chain_between_two_driver_modules(client, model):
    chain = tg.GraphChain(copy.deepcopy(model), client=client)
    head, tail = nn.Linear(2, 3), nn.Linear(4, 1)
    x = torch.randn(5, 2)
    tail(tg.collect(chain(head(x)))).sum().backward()
    ours = [p.grad for p in [*head.parameters(), *tail.parameters()]]
    head.zero_grad(), tail.zero_grad()
    tail(model(head(x))).sum().backward()
    for a, p in zip(ours, [*head.parameters(), *tail.parameters()], strict=True):
        assert_same(a, p.grad)
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_no_tape_without_grad(client, model, guard):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3)
    before = chain(x)
    with guard():
        inside = chain(x)
        out = tg.collect(inside)
        assert not tg.collect(before).requires_grad
        assert total_held(client)["tapes"] == 0
    assert_same(out, model(x).detach())
    assert not tg.collect(inside).requires_grad
    for thunk in (before, inside):
        with pytest.raises(tg.TapeError, match="no_grad"):
            thunk.backward(torch.ones(6, 4))


def test_retain_graph(client, model):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3, requires_grad=True)
    out = tg.collect(chain(x)).sum()
    out.backward(retain_graph=True)
    assert total_held(client)["tapes"] == 2
    first = x.grad.clone()
    out.backward()
    assert_same(x.grad, first + first)
    assert total_held(client)["tapes"] == 0
    with pytest.raises(tg.TapeError, match="second time"):
        out.backward()


def test_two_collects_share_a_trunk(client, model):
    """Plain torch sums both heads' gradients; neither backward may use up the other's tape."""
    trunk = tg.GraphChain(model, client=client)
    heads = [nn.Linear(4, 2), nn.Linear(4, 3)]
    chains = [tg.GraphChain(copy.deepcopy(h), client=client) for h in heads]
    x = torch.randn(6, 3, requires_grad=True)
    h = trunk(x)
    a, b = tg.collect(chains[0](h)), tg.collect(chains[1](h))
    (a.sum() + (b**2).sum()).backward()
    ours, x.grad = x.grad, None
    h = model(x)
    (heads[0](h).sum() + (heads[1](h) ** 2).sum()).backward()
    torch.testing.assert_close(ours, x.grad)
    assert total_held(client)["tapes"] == 0


def test_collected_together_is_one_backward(client, model):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3, requires_grad=True)
    h = chain(x)
    a, b, n = tg.collect([h * 2, tg.spawn(torch.exp, h), 3])
    assert n == 3
    (a.sum() + b.sum()).backward()
    ours, x.grad = x.grad, None
    h = model(x)
    ((h * 2).sum() + torch.exp(h).sum()).backward()
    assert_same(ours, x.grad)


def test_only_one_of_two_is_used(client, model):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3, requires_grad=True)
    h = chain(x)
    a, _ = tg.collect((h * 2, h * 3))
    a.sum().backward()
    ours, x.grad = x.grad, None
    (model(x) * 2).sum().backward()
    assert_same(ours, x.grad)


def test_double_backward_is_refused(client, model):
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(6, 3, requires_grad=True)
    (gx,) = torch.autograd.grad(tg.collect(chain(x)).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gx.sum().backward()


def test_dropping_the_result_releases_the_tapes(client, model):
    chain = tg.GraphChain(model, client=client)
    out = tg.collect(chain(torch.randn(6, 3)))
    assert total_held(client)["tapes"] == 2
    del out
    assert wait_until(lambda: total_held(client)["tapes"] == 0)
