"""What modules carry beside their parameters: hooks, state of their own, where tensors lie."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as process
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from beside import assert_backward_equals_torch, assert_trains_as_torch
from helpers import assert_same

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(8, 6)


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer() for layer in layers), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    )


def hooked_layers():
    model = net()
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[0].register_forward_hook(
        lambda m, args, kwargs, out: out + m.bias, with_kwargs=True, prepend=True
    )
    model[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model[2].register_forward_pre_hook(
        lambda m, args, kwargs: ((), {"input": args[0] * 0.5}), with_kwargs=True
    )
    model[1].register_full_backward_hook(lambda m, ins, outs: (ins[0] * 0.5,))
    model[1].register_full_backward_pre_hook(lambda m, outs: (outs[0].clamp(-0.1, 0.1),))
    return model


def hooked_container():
    model = nn.Sequential(net(), nn.Linear(2, 2))
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[0].register_full_backward_hook(lambda m, ins, outs: None)
    return model


@pytest.mark.parametrize(
    ("make", "placement"), [(hooked_layers, [0, 1, 0]), (hooked_container, [0, 1])]
)
def test_hooks_of_modules_run_as_in_plain_torch(client, x, make, placement):
    assert_backward_equals_torch(make, x, placement=placement, repeat=2)


class Remembers(nn.Sequential):
    """A container with state of its own, and parts that stay in evaluation mode."""

    epoch = 3

    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def without_the_mean(module, state, prefix, metadata):
    del state[f"{prefix}0.running_mean"]


def remembering():
    return nn.Sequential(Remembers(nn.BatchNorm1d(6), nn.Linear(6, 6)), nn.Linear(6, 2))


def test_state_and_modes_of_containers_are_kept(client, x):
    torch.manual_seed(0)
    model = remembering()
    model[0].register_state_dict_post_hook(without_the_mean)
    chain = tg.GraphChain(model, placement=[0, 1])
    assert list(chain.state_dict()) == list(model.state_dict())
    assert chain.state_dict()["0._extra_state"] == {"epoch": 3}
    torch.manual_seed(0)
    plain = remembering()
    chain = tg.GraphChain(plain, placement=[0, 1])
    assert_same(tg.collect(chain.train()(x)).detach(), plain.train()(x).detach())


def test_hooks_on_all_modules_of_the_process_are_refused(client, x):
    chain = tg.GraphChain(net())
    handle = process.register_module_forward_hook(lambda m, args, out: out * 2)
    try:
        for run in (
            lambda: tg.GraphChain(net()),
            lambda: chain(x),
            lambda: tg.spawn(net(), x),
            lambda: tg.map(net(), [x]),
            lambda: tg.pmap(net())(torch.stack([x, x])),
        ):
            with pytest.raises(tg.TaskgradError, match="hooks on all modules.*Remove them"):
                run()
    finally:
        handle.remove()
    tg.collect(chain(x))


def test_an_attribute_computed_from_parameters_is_refused(client):
    layer = nn.Linear(2, 2)
    layer.doubled = layer.weight * 2
    with pytest.raises(TypeError, match="attribute 'doubled' of a Linear was computed"):
        tg.GraphChain(nn.Sequential(layer))
    layer.doubled = layer.doubled.detach()
    assert tg.GraphChain(nn.Sequential(layer)).to_module()[0].doubled.grad_fn is None


def test_lazy_modules_are_refused_until_they_have_run(client, x):
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="'0.weight' is uninitialized.*run the model once"):
        tg.GraphChain(model)
    model(x)
    assert_same(tg.collect(tg.GraphChain(model)(x)).detach(), model(x).detach())


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = torch.tanh(self.inner(x))
        [slope] = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope


class Slope(nn.Module):
    """No parameters, and asks whether gradients are taken."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return x * 0
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]


def test_autograd_inside_of_a_layer(client, x):
    make = functools.partial(net, Penalty)
    assert_backward_equals_torch(make, x, placement=[0, 1, 1, 0])
    chain, plain = tg.GraphChain(net(Slope), placement=[0, 1, 1, 1]), net(Slope)
    assert_same(tg.collect(chain(x)).detach(), plain(x).detach())
    assert_same(tg.collect(tg.spawn(Slope(), x)), Slope()(x))
    with torch.no_grad():
        assert_same(tg.collect(chain(x)), plain(x))


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


def test_reentrant_checkpointing_is_an_error_that_says_what_to_do(client, x):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(6, 6), Reentrant()), placement=[0, 1])
    with pytest.raises(tg.LayerError, match="use use_reentrant=False"):
        tg.spawn(torch.sum, chain(x)).backward()


class Thaws(nn.Linear):
    def forward(self, x):
        self.weight.requires_grad_(True)
        return super().forward(x)


def test_a_parameter_that_a_forward_unfreezes_is_an_error(client, x):
    model = nn.Sequential(nn.Linear(6, 6), Thaws(6, 2))
    model[1].weight.requires_grad_(False)
    chain = tg.GraphChain(model, placement=[0, 1])
    with pytest.raises(tg.LayerError, match="'1.weight'.*was frozen when the chain was made"):
        tg.collect(chain(x))


class Views(nn.Module):
    """Tensors that show the same memory; the forward writes one of them."""

    def __init__(self):
        super().__init__()
        big = torch.zeros(12)
        self.w = nn.Parameter(torch.arange(12.0).reshape(2, 6))
        self.register_buffer("first", big[:6])
        self.register_buffer("whole", big)
        self.register_buffer("row", self.w.data[0])
        self.register_buffer("same", torch.ones(1).expand(6))

    def forward(self, x):
        self.first += 1
        return x * self.w.sum(0) + self.whole[:6] * self.row + self.same


def views():
    return net(Views)


def layouts():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, (1, 2)), nn.Flatten(), nn.Linear(8, 2)
    )
    model[1].to(memory_format=torch.channels_last)
    model[3].weight = nn.Parameter(model[3].weight.data.t().contiguous().t())
    model[3].bias = nn.Parameter(torch.randn(4)[::2])
    return model


@pytest.mark.parametrize(("make", "placement"), [(views, [0, 1, 1, 0]), (layouts, [0, 0, 1, 1])])
def test_tensors_lie_in_memory_as_they_did(client, x, make, placement):
    assert_backward_equals_torch(make, x, placement=placement, repeat=2)
    assert_trains_as_torch(make, x, SGD, placement=placement)
    for (name, p), q in zip(
        tg.GraphChain(make(), placement=placement).to_module().named_parameters(),
        make().parameters(),
        strict=True,
    ):
        assert p.stride() == q.stride(), name


def test_parameters_that_share_memory_are_on_one_worker(client):
    model = net()
    model[2].bias = nn.Parameter(model[0].bias.data[:2])
    with pytest.raises(tg.PlacementError, match="'0.bias', which shares memory with '2.bias'"):
        tg.GraphChain(model, placement=[0, 1, 1])
    rows = tg.GraphChain(model, placement="round_robin").placement
    assert rows[0].worker == rows[2].worker


class Marked(torch.Tensor):
    """A tensor of a class of the user's own."""


def subclassed():
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Marked))
    return model


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).abs()


@pytest.mark.parametrize("make", [subclassed, functools.partial(net, Complex)])
def test_parameters_of_other_kinds(client, x, make):
    placement = [0, 1, 1, 0][-len(make()) :]
    assert_backward_equals_torch(make, x, placement=placement, repeat=2)
    back = tg.GraphChain(make()).to_module()
    assert [type(p) for p in back.parameters()] == [type(p) for p in make().parameters()]


def test_hooks_on_parameters_of_other_kinds_are_refused(client):
    model = subclassed()
    model[0].weight.register_hook(lambda grad: grad)
    with pytest.raises(TypeError, match="layer '0'.*hooks on its parameter '0.weight'.*Marked"):
        tg.GraphChain(model)
