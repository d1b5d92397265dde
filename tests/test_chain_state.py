"""State of a chain: modes, buffers, state_dict, the module back, the optimizer."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same


def net():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True)))
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 3)))
    return model


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_same(ours[name], value, name)


def test_names_and_buffers(client):
    model = net()
    chain = tg.GraphChain(model, client=client)
    assert_same_state(chain.state_dict(), model.state_dict())
    info = dict(chain.named_parameters_info())
    assert list(info) == [n for n, _ in model.named_parameters()]
    assert info["stem.0.weight"].shape == (4, 1, 3, 3)
    assert len(chain) == 5


def test_the_users_model_is_not_touched(client):
    model = net()
    before = copy.deepcopy(model.state_dict())
    chain = tg.GraphChain(model, client=client)
    tg.collect(chain(torch.randn(2, 1, 8, 8))).sum().backward()
    tg.Optimizer(chain, torch.optim.SGD).step()
    assert_same_state(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


def test_train_and_eval_belong_to_the_call(client):
    model = net()
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        lazy_eval = chain.eval()(x)
        lazy_train = chain.train()(x)
        chain.eval()
        out = tg.collect(lazy_eval)
        assert_same(out, model.eval()(x))
        assert chain.state_dict()["stem.1.num_batches_tracked"] == 0
        assert_same(tg.collect(lazy_train), model.train()(x))
    assert_same_state(chain.state_dict(), model.state_dict())
    assert not chain.to_module().training


def test_load_state_dict(client):
    chain, other = tg.GraphChain(net(), client=client), net()
    for p in other.parameters():
        nn.init.normal_(p)
    assert chain.load_state_dict(other.state_dict()) == ([], [])
    assert_same_state(chain.state_dict(), other.state_dict())
    part = {"head.1.bias": torch.zeros(3), "stranger": torch.zeros(1)}
    missing, unexpected = chain.load_state_dict(part, strict=False)
    assert unexpected == ["stranger"]
    assert "stem.0.weight" in missing
    assert chain.state_dict()["head.1.bias"].sum() == 0


class Tagged(nn.Sequential):
    """A container of the user's own, with something to remember."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.tag = "mine"


def test_to_module_is_the_users_own(client):
    model = Tagged(net(), nn.Linear(3, 2))
    model[1].register_buffer("scratch", torch.ones(2), persistent=False)
    chain = tg.GraphChain(model, client=client, placement="round_robin")
    back = chain.to_module()
    assert type(back) is Tagged
    assert back.tag == "mine"
    assert repr(back) == repr(model)
    assert_same(back[1].scratch, torch.ones(2))
    x = torch.randn(2, 1, 8, 8)
    assert_same(back(x), model(x))
    assert all(p.is_leaf and p.requires_grad for p in back.parameters())


def test_trained_module_loads_without_taskgrad(client, tmp_path):
    chain = tg.GraphChain(net(), client=client)
    torch.save(chain.to_module().state_dict(), tmp_path / "net.pt")
    script = f"""
        import sys, torch
        state = torch.load({str(tmp_path / "net.pt")!r})
        torch.nn.Conv2d(1, 4, 3).load_state_dict(
            {{k.removeprefix("stem.0."): v for k, v in state.items() if k.startswith("stem.0.")}})
        assert "taskgrad" not in sys.modules and "dask" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=200)


def test_container_with_a_forward_of_its_own_is_one_layer(client):
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked.register_forward_hook(lambda m, i, o: o * 3)
    model = nn.Sequential(Residual(nn.Linear(2, 2)), hooked)
    chain = tg.GraphChain(model, client=client)
    assert [row.layer for row in chain.placement] == ["0", "1"]
    x = torch.randn(3, 2)
    assert_same(tg.collect(chain(x)).detach(), model(x).detach())


def test_any_module_is_a_chain_of_one_layer(client):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x, *, scale):
            return self.a(x) * scale

    model = Two()
    chain = tg.GraphChain(model, client=client)
    x = torch.randn(3, 2)
    assert_same(tg.collect(chain(x, scale=2.0)).detach(), model(x, scale=2.0).detach())
    assert list(chain.state_dict()) == ["a.weight", "a.bias"]
    assert_same_state(chain.to_module().state_dict(), model.state_dict())


def test_zero_grad_and_grads_are_copies(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 1)), client=client)
    x = torch.ones(1, 2)
    tg.collect(chain(x)).sum().backward()
    first = chain.grads()["0.weight"]
    kept = tg.collect(first)
    tg.collect(chain(x)).sum().backward()  # adds in place, on the worker
    assert_same(kept, torch.ones(1, 2))
    assert_same(first.compute(), torch.ones(1, 2))
    assert_same(tg.collect(chain.grads()["0.weight"]), torch.full((1, 2), 2.0))
    chain.zero_grad()
    assert tg.collect(chain.grads()["0.weight"]) is None


def test_gradients_that_were_read_together_stay_as_they_were_read(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 1)), client=client)
    x = torch.ones(1, 2)
    chain(x).backward(torch.ones(1, 1))
    grads = chain.grads()
    first = tg.collect(grads)
    chain(x).backward(torch.ones(1, 1))
    for name, grad in grads.items():
        assert_same(tg.collect(grad), first[name], name)
        assert_same(tg.collect(grad * 1), first[name], name)
    assert_same(tg.collect(chain.grads())["0.bias"], 2 * first["0.bias"])


def test_an_output_that_is_a_parameter_does_not_change_under_an_update(client):
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.w

    chain = tg.GraphChain(Weight(), client=client)
    y = chain(torch.ones(1))
    tg.spawn(torch.sum, y).backward()
    tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=1.0)).step()
    assert_same(tg.collect(tg.spawn(torch.clone, y)).detach(), torch.ones(4))


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    ],
)
def test_training_equals_torch_bit_for_bit(client, factory):
    model = net()
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1, 1, 0])
    ours, theirs = tg.Optimizer(chain, factory), factory(model.parameters())
    for step in range(5):
        torch.manual_seed(step)
        x, t = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
        tg.spawn(F.cross_entropy, chain(x), t).backward()
        ours.step()
        ours.zero_grad()
        F.cross_entropy(model(x), t).backward()
        theirs.step()
        theirs.zero_grad()
    assert_same_state(chain.state_dict(), model.state_dict())


def test_tied_parameters_over_two_workers_stay_equal(client):
    model = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 7, bias=False))
    model[2].weight = model[0].weight
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    ours = tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=0.1))
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 7, (4, 5))
    for _ in range(3):
        tg.spawn(torch.sum, chain(ids)).backward()
        ours.step(), ours.zero_grad()
        model(ids).sum().backward()
        theirs.step(), theirs.zero_grad()
    assert_same_state(chain.state_dict(), model.state_dict())


def test_microbatches_in_one_graph(client):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    xs, ts = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
    losses = [tg.spawn(F.cross_entropy, chain(x), t) for x, t in zip(xs, ts, strict=True)]
    sum(losses[1:], losses[0]).backward()
    sum(F.cross_entropy(model(x), t) for x, t in zip(xs, ts, strict=True)).backward()
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)


@pytest.mark.parametrize(("factory", "match"), [(3, "partial"), (torch.optim.SGD, "no trainable")])
def test_optimizer_refuses(client, factory, match):
    chain = tg.GraphChain(nn.Sequential(nn.ReLU()), client=client)
    with pytest.raises((TypeError, ValueError), match=match):
        tg.Optimizer(chain, factory)


class TwoBiases(nn.Module):
    """Autograd gives both parameters, and the input, one and the same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (x + self.a + self.b) * 2


def test_gradients_that_autograd_shares_are_added_to_one_by_one(client):
    chain = tg.GraphChain(nn.Sequential(TwoBiases()), client=client)
    for _ in range(2):
        tg.spawn(torch.sum, chain(torch.ones(3))).backward()
    grads = {name: tg.collect(grad).tolist() for name, grad in chain.grads().items()}
    assert grads == {"0.a": [4.0] * 3, "0.b": [4.0] * 3}
