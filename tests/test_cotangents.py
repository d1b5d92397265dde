"""A wrong cotangent uses up no tape: the right one still works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same, long


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
RIGHT = torch.ones(5, 2)
WRONG = {
    "shape": torch.ones(5, 3),
    "fewer dimensions": torch.ones(2),
    "dtype": torch.ones(5, 2, dtype=torch.float64),
    "structure": (torch.ones(5, 2),),
    "a number": 1.0,
    "a string": "ones",
    "none, and the output is no scalar": None,
    "sparse": torch.ones(5, 2).to_sparse(),
    "without values": torch.ones(5, 2, device="meta"),
}


def expected():
    model = net()
    x = X.clone().requires_grad_()
    model(x).backward(RIGHT)
    return model, x.grad


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("collected", [False, *long(True)])
def test_backward(client, wrong, collected):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    model, gx = expected()
    x = X.clone().requires_grad_()
    y = chain(x)
    if collected:
        with torch.no_grad():
            tg.collect(chain(X))  # something else
        tg.collect(y)
        model(X)
    given = WRONG[wrong]
    for cotangent in (given, tg.spawn(torch.clone, given, worker=0) if wrong == "shape" else given):
        with pytest.raises(tg.CotangentError):
            y.backward(cotangent)
    y.backward(RIGHT)
    assert_same(x.grad, gx)
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)
    with pytest.raises(tg.TapeError):
        y.backward(RIGHT)
    if not collected:  # the forward has not run again
        for name, value in model.named_buffers():
            assert_same(chain.state_dict()[name], value, name)
    del y
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


@pytest.mark.parametrize("wrong", WRONG)
def test_vjp(client, wrong):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    model, gx = expected()
    y, back = tg.vjp(chain, X)
    if WRONG[wrong] is not None:
        with pytest.raises(tg.CotangentError):
            tg.collect(back(WRONG[wrong]))
    grads, ours = tg.collect(back(RIGHT))
    assert_same(ours, gx)
    for name, grad in grads.items():
        assert_same(grad, model.get_parameter(name).grad, name)
    with pytest.raises(tg.TapeError):
        back(RIGHT)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "structure", "a string"])
@pytest.mark.parametrize("position", [1, *long(0)])
def test_vjp_of_several_outputs_of_which_one_has_a_wrong_cotangent(client, wrong, position):
    """Nor do the outputs that have a right one lose theirs."""
    first = tg.GraphChain(nn.Sequential(nn.Linear(3, 4)), client=client, placement=[0])
    last = tg.GraphChain(nn.Sequential(nn.Linear(4, 2)), client=client, placement=[1])

    def both(x):
        h = first(x)
        return h, last(h)

    (h, y), back = tg.vjp(both, X)
    right = (torch.ones(5, 4), torch.ones(5, 2))
    given = [*right]
    given[position] = WRONG[wrong]
    with pytest.raises(tg.CotangentError):
        tg.collect(back(tuple(given)))
    given[position] = tg.spawn(torch.ones, 7, worker=0)
    with pytest.raises(tg.CotangentError):
        tg.collect(back(tuple(given)))
    grads, gx = tg.collect(back(right))
    x = X.clone().requires_grad_()
    a, b = first.to_module(), last.to_module()
    hidden = a(x)
    torch.autograd.backward([hidden, b(hidden)], right)
    assert_same(gx, x.grad)
    assert_same(grads["Sequential.0.weight"], a[0].weight.grad)
    assert_same(grads["Sequential_1.0.weight"], b[0].weight.grad)


def test_the_bridge(client):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    model, gx = expected()
    x = X.clone().requires_grad_()
    y = tg.collect(chain(x))
    for wrong in (torch.ones(5, 3), torch.ones(2), "ones", None):
        with pytest.raises((RuntimeError, TypeError)):
            y.backward(wrong)
    y.backward(RIGHT)
    assert_same(x.grad, gx)
    assert_same(tg.collect(chain.grads()["3.weight"]), model[3].weight.grad)


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_map(client, over):
    w = torch.randn(3, requires_grad=True)

    def scaled(x):
        return x * w

    results = tg.map(scaled, list(X), over=over)
    for wrong in (torch.ones(4), "ones", None):
        with pytest.raises((RuntimeError, TypeError)):
            torch.autograd.backward(results, [torch.ones(3)] * 4 + [wrong])
    torch.autograd.backward(results, [torch.ones(3)] * 5)
    theirs = w.detach().clone().requires_grad_()
    torch.autograd.backward([x * theirs for x in X], [torch.ones(3)] * 5)
    assert torch.allclose(w.grad, theirs.grad)


def test_pmap(client):
    def summed(x):
        return x * tg.psum(x, "i")

    x = torch.randn(2, 3, requires_grad=True)
    y = tg.pmap(summed, axis_name="i")(x)
    for wrong in (torch.ones(2, 4), torch.ones(3), "ones", None):
        with pytest.raises((RuntimeError, TypeError)):
            y.backward(wrong)
    y.backward(torch.ones(2, 3))
    theirs = x.detach().clone().requires_grad_()
    (theirs * theirs.sum(0)).sum().backward()
    assert torch.allclose(x.grad, theirs.grad)
