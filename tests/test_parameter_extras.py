"""What parameters carry beside their values: hooks on gradients, attributes, where they lie."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from beside import (
    assert_backward_equals_torch,
    assert_same_grads,
    assert_same_state,
    assert_trains_as_torch,
)
from conftest import total_held, wait_until
from helpers import assert_same
from plain import PlainTrainer

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(8, 6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))


def clip(grad):
    return grad.clamp(-1e-3, 1e-3)


def watch(grad):
    return None


def double_in_place(grad):
    grad.mul_(2)


def clip_accumulated(parameter):
    parameter.grad.clamp_(-15e-4, 15e-4)


def masked():
    model, keep = net(), torch.ones(6, 1)
    keep[:3] = 0
    model[0].weight.register_hook(lambda grad: grad * keep)
    return model


def several():
    model = net()
    removed = model[0].weight.register_hook(lambda grad: grad * 0)
    for hook in (clip, watch, double_in_place, clip):
        model[0].weight.register_hook(hook)
    removed.remove()
    for hook in (clip_accumulated, lambda p: setattr(p, "grad", p.grad * 0.5)):
        model[2].weight.register_post_accumulate_grad_hook(hook)
    return model


def tied():
    model = net()
    model[2].weight = model[0].weight
    model[0].weight.register_hook(clip)
    model[0].weight.register_post_accumulate_grad_hook(clip_accumulated)
    return model


def frozen():
    model = several()
    model[0].weight.requires_grad_(False)
    return model


class Hooked(nn.Linear):
    """Its hooks are methods of its own, and one uses the parameter itself."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.tensor([1.0, 0.0]).repeat(3))
        self.handle = self.weight.register_hook(self.masked)
        self.bias.register_hook(lambda grad: grad + 0.1 * self.bias.detach())
        self.calls = 0

    def masked(self, grad):
        return grad * self.mask


class Unhooks(Hooked):
    """Its second forward takes the hook off."""

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            self.handle.remove()
        return super().forward(x)


def of_the_module():
    torch.manual_seed(0)
    return nn.Sequential(Hooked(6, 6), nn.Tanh(), Hooked(6, 6), nn.Linear(6, 2))


@pytest.mark.parametrize("make", [masked, several, tied, frozen, of_the_module])
def test_hooks_on_parameters_run_as_in_plain_torch(client, x, make):
    assert_backward_equals_torch(make, x, placement=[0, 0, 1, 0], repeat=3)
    assert_trains_as_torch(make, x, SGD, placement=[0, 0, 1, 0])


def test_a_layer_can_take_a_hook_off_by_its_handle(client, x):
    torch.manual_seed(0)
    plain = nn.Sequential(Unhooks(6, 6), nn.Linear(6, 2))
    chain = tg.GraphChain(plain, placement=[1, 0])
    for _ in range(2):
        tg.spawn(torch.sum, chain(x)).backward()
        plain(x).sum().backward()
        assert_same_grads(chain, plain)


def test_hooks_see_the_sum_of_all_that_one_backward_gives(client, x):
    chain, plain = tg.GraphChain(several(), placement=[0, 0, 1, 0]), several()
    for _ in range(2):
        (tg.collect(chain(x)).sum() + tg.collect(chain(2 * x)).sum()).backward()
        (plain(x).sum() + plain(2 * x).sum()).backward()
        assert_same_grads(chain, plain)
    losses = [tg.spawn(torch.sum, chain(k * x)) for k in range(3)]
    sum(losses[1:], losses[0]).backward()
    sum(plain(k * x).sum() for k in range(3)).backward()
    assert_same_grads(chain, plain)


def test_hooks_see_sparse_gradients(client):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
        model[0].weight.register_hook(lambda grad: grad * 0.5)
        return model

    chain, plain = tg.GraphChain(make(), placement=[0, 1, 1]), make()
    ids = torch.randint(10, (4, 3))
    for _ in range(2):
        tg.spawn(torch.sum, chain(ids)).backward()
        plain(ids).sum().backward()
    found = tg.collect(chain.grads()["0.weight"])
    assert_same(found.to_dense(), plain[0].weight.grad.to_dense())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"accumulate": 2}, {"accumulate": 2}),
        ({"amp": "bf16", "checkpoint": "always"}, {"autocast": torch.bfloat16}),
        ({"schedule": "gpipe"}, {}),
    ],
)
def test_hooks_run_once_a_microbatch_in_a_trainer(client, x, ours, theirs):
    chain = tg.GraphChain(several(), placement=[0, 0, 1, 0])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=4, **ours)
    plain = PlainTrainer(several(), F.mse_loss, SGD, microbatches=4, **theirs)
    for _ in range(4):
        trainer.step(x, torch.ones(8, 2))
    trainer.wait()
    plain.train([(x, torch.ones(8, 2))] * 4)
    assert_same_state(chain.state_dict(), plain.model.state_dict())


def test_a_hook_that_draws_draws_the_same_wherever_it_runs(client, x):
    states = []
    for placement in ([0, 0, 1, 0], [1, 0, 0, 1]):
        model = net()
        model[2].weight.register_hook(lambda grad: grad + torch.randn_like(grad))
        chain = tg.GraphChain(model, placement=placement)
        tg.Trainer(chain, F.mse_loss, SGD, microbatches=2).step(x, torch.ones(8, 2)).item()
        states.append(chain.state_dict())
    assert_same_state(*states)


def test_hooks_of_modules_given_to_spawn_map_and_pmap_run_on_the_driver(client, x):
    seen = []

    def make():
        model = several()
        model[0].bias.register_hook(seen.append)
        return model

    plain, parts = make(), (x[:4], x[4:])
    (plain(parts[0]).sum() + plain(parts[1]).sum()).backward()

    for run in (
        lambda m: sum(y.sum() for y in tg.map(m, parts)).backward(),
        lambda m: tg.pmap(m)(torch.stack(parts)).sum().backward(),
        lambda m: sum(tg.collect([tg.spawn(torch.sum, tg.spawn(m, p)) for p in parts])).backward(),
    ):
        model = make()
        seen.clear()
        run(model)
        assert len(seen) == 1
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_same(p.grad, q.grad, name)


def test_vjp_of_a_module_with_hooks_is_refused(client, x):
    with pytest.raises(TypeError, match="'0.weight' has hooks.*thunk.backward.*GraphChain"):
        tg.vjp(masked(), x)


def test_an_optimizer_in_a_hook_after_accumulation(client, x):
    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad * 0.1)
        parameter.grad = None

    def make(build=net):
        model = build()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        return model

    chain, plain = tg.GraphChain(make(), placement=[0, 0, 1, 0]), make()
    for _ in range(2):
        tg.spawn(torch.sum, chain(x)).backward()
        plain(x).sum().backward()
    assert_same_state(chain.state_dict(), plain.state_dict())
    assert not any(grad is not None for grad in tg.collect(chain.grads()).values())

    before = chain.state_dict()
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    with pytest.raises(tg.LayerError, match="changed the parameter.*leave it to the optimizer"):
        trainer.step(x, torch.ones(8, 2)).item()
    assert_same_state(chain.state_dict(), before)

    chain = tg.GraphChain(make(tied), placement=[0, 0, 1, 0])
    before = chain.state_dict()
    with pytest.raises(tg.LayerError, match="'0.weight'.*copies of it.*one worker"):
        tg.spawn(torch.sum, chain(x)).backward()
    assert_same(chain.state_dict()["0.weight"], before["0.weight"])


def fails(grad):
    raise ValueError("no good")


def cuts(grad):
    return grad[:2]


@pytest.mark.parametrize(("hook", "said"), [(fails, "no good"), (cuts, "changed the size")])
def test_a_hook_that_fails_is_an_error_that_names_its_parameter(client, x, hook, said):
    model = net()
    model[0].weight.register_hook(hook)
    chain = tg.GraphChain(model, placement=[0, 0, 1, 0])
    before = chain.state_dict()
    for run in (
        lambda c: tg.spawn(torch.sum, c(x)).backward(),
        lambda c: tg.collect(c(x)).sum().backward(),
        lambda c: tg.collect(tg.vjp(c, x)[1](torch.ones(8, 2))[0]),
        lambda c: tg.Trainer(c, F.mse_loss, SGD).step(x, torch.ones(8, 2)).item(),
    ):
        with pytest.raises(tg.LayerError, match=f"hook of parameter '0.weight'.*{said}"):
            run(chain)
    assert_same_state(chain.state_dict(), before)
    del chain
    assert wait_until(lambda: not any(total_held(client).values()))


def test_what_cannot_be_pickled_is_named(client, x):
    lock = threading.Lock()

    def hook(grad):
        with lock:
            return grad

    model = net()
    model[0].weight.register_hook(hook)
    with pytest.raises(TypeError, match="layer '0'.*hook .*hook' of '0.weight'.*lock"):
        tg.GraphChain(model)
    model = net()
    model[2].bias.tag = lock
    with pytest.raises(TypeError, match="layer '2'.*attribute 'tag' of '2.bias'"):
        tg.GraphChain(model)
    with pytest.raises(TypeError, match="attribute 'tag' of '2.bias'"):
        tg.spawn(model, x)


def scaled_by_another():
    model = net()
    other = model[3].bias
    model[0].weight.register_hook(lambda grad: grad * other.sum())
    return model


def test_a_layer_that_uses_anothers_tensor_in_a_hook_is_with_that_layer(client, x):
    assert_trains_as_torch(scaled_by_another, x, SGD, placement=[0, 1, 1, 0])
    with pytest.raises(tg.PlacementError, match="'0' uses '3.bias' in a hook .* layer '3'"):
        tg.GraphChain(scaled_by_another(), placement=[0, 0, 1, 1])
    rows = tg.GraphChain(scaled_by_another(), placement="round_robin").placement
    assert [r.worker == rows[0].worker for r in rows] == [True, False, True, True]


def labelled():
    model = net()
    for name, p in model.named_parameters():
        p.is_bias = "bias" in name
        p.tags = {"name": name}
    model[2].register_buffer("extra", torch.ones(3))
    model[2].extra.role = "mask"
    model[2].note = [1, 2]
    return model


def by_attribute(parameters):
    parameters = list(parameters)
    biases = [p for p in parameters if p.is_bias]
    others = [p for p in parameters if not p.is_bias]
    return torch.optim.SGD([{"params": biases, "lr": 0.5}, {"params": others}], lr=0.1)


def test_optimizers_group_parameters_by_their_attributes(client, x):
    assert_trains_as_torch(labelled, x, by_attribute, placement=[0, 0, 1, 0])
    chain, plain = tg.GraphChain(labelled(), placement=[0, 0, 1, 0]), labelled()
    ours, theirs = tg.Optimizer(chain, by_attribute), by_attribute(plain.parameters())
    tg.spawn(torch.sum, chain(x)).backward()
    plain(x).sum().backward()
    ours.step(), theirs.step()
    assert_same_state(chain.state_dict(), plain.state_dict())


@pytest.mark.parametrize("given", [labelled, labelled()])
def test_attributes_and_hooks_come_back_with_the_module(client, given):
    if not isinstance(given, nn.Module):  # a factory: its tensors have no values on the driver
        given = lambda: labelled()[:2]  # noqa: E731
    chain = tg.GraphChain(given, placement="round_robin")
    back = chain.to_module()
    for name, p in back.named_parameters():
        assert p.is_bias == ("bias" in name)
        assert p.tags == {"name": name}
    if len(back) == 4:
        assert back[2].extra.role == "mask"
        assert back[2].note == [1, 2]
    back = tg.GraphChain(frozen()).to_module()
    back[0].weight.requires_grad_(True)
    back(torch.ones(2, 6)).sum().backward()
    assert back[0].weight.grad.abs().max() == 1e-3


class Attributed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))
        self.w.scale = 3.0
        self.w.shift = torch.arange(6.0)

    def forward(self, x):
        return x * self.w * self.w.scale + self.w.shift


def test_functions_see_attributes_too(client, x):
    module = Attributed()
    expected = module(x).detach()
    assert_same(tg.collect(tg.spawn(module, x)).detach(), expected)
    assert_same(tg.map(module, [x])[0].detach(), expected)
    assert_same(tg.pmap(module)(torch.stack([x, x]))[0].detach(), expected)
