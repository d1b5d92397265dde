"""Modules with parametrizations, old norms and pruning: over workers as in plain torch."""

from __future__ import annotations

import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import taskgrad as tg
from beside import assert_backward_equals_torch, assert_same_state, assert_trains_as_torch
from helpers import assert_same, long

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Scale(nn.Module):
    """A parametrization with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, value):
        self.calls += 1
        return value * self.factor


class RankOne(nn.Module):
    """A parametrization by two tensors."""

    def forward(self, x, y):
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, z):
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        root = s[0].sqrt().unsqueeze(-1)
        return u[..., :, 0] * root, vh[..., 0, :] * root


class Locked(nn.Linear):
    """Says itself how it is pickled."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(6, 6))

    def forward(self, x):
        with parametrize.cached():
            return self.inner(self.inner(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.utils.weight_norm(nn.LSTM(6, 6, batch_first=True), "weight_hh_l0")

    def forward(self, x):
        return self.inner(x.unsqueeze(1))[0].squeeze(1)


def norms():
    return [
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        parametrizations.weight_norm(nn.Linear(6, 6)),
        parametrizations.orthogonal(nn.Linear(6, 2)),
    ]


def own():
    first, second = nn.Linear(6, 6), nn.Linear(6, 2)
    parametrize.register_parametrization(first, "weight", RankOne())
    parametrize.register_parametrization(first, "weight", Scale())
    parametrize.register_parametrization(second, "bias", Scale())
    return [first, nn.Tanh(), second]


def tied():
    first, last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    last.weight = first.weight
    parametrize.register_parametrization(first, "weight", nn.Tanh())
    return [first, nn.Tanh(), last]


def old_norms():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = nn.utils.weight_norm(nn.Linear(6, 6))
        return [first, Recurrent(), nn.utils.spectral_norm(nn.Linear(6, 2))]


def pruned():
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)]
    prune.l1_unstructured(layers[0], "weight", amount=0.4)
    prune.random_unstructured(layers[2], "weight", 0.3)
    prune.ln_structured(layers[2], "weight", 0.5, n=2, dim=0)
    return layers


def others():
    return [parametrizations.weight_norm(Locked(6, 6)), Twice(), nn.Linear(6, 2)]


def made(layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers())


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(8, 6)


@pytest.mark.parametrize("layers", [norms, tied, *long(own, old_norms, pruned, others)])
def test_gradients_buffers_and_training_are_plain_torchs(client, x, layers):
    make = functools.partial(made, layers)
    assert_backward_equals_torch(make, x, placement=[0, 0, 1], repeat=2)
    assert_trains_as_torch(make, x, SGD, placement=[0, 1, 0])


def test_the_module_that_comes_back_is_of_the_same_kind(client, x):
    chain = tg.GraphChain(made(own), placement=[0, 0, 1])
    back = chain.to_module()
    assert_same_state(back.state_dict(), made(own).state_dict())
    assert repr(back) == repr(made(own))
    parametrize.remove_parametrizations(back[2], "bias")
    assert type(back[2]) is nn.Linear
    back = tg.GraphChain(made(pruned)).to_module()
    prune.remove(back[0], "weight")
    assert "weight" in dict(back[0].named_parameters())


def test_spawn_map_and_pmap_of_parametrized_modules(client, x):
    ours, plain = made(norms), made(norms)
    tg.spawn(torch.sum, tg.spawn(ours, x)).backward()
    plain(x).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_same(p.grad, q.grad, name)
    assert_same_state(ours.state_dict(), plain.state_dict())  # the power iteration came home
    ours.eval(), plain.eval()
    for found, item in zip(tg.map(ours, [x[:4], x[4:]]), (x[:4], x[4:]), strict=True):
        assert_same(found.detach(), plain(item).detach())
    found = tg.pmap(ours)(torch.stack([x[:4], x[4:]]))
    assert_same(found.detach()[1], plain(x[4:]).detach())


def test_state_of_parametrized_layers_loads(client, x, tmp_path):
    other = made(own)
    for p in other.parameters():
        nn.init.normal_(p)
    chain = tg.GraphChain(made(own), placement=[0, 0, 1])
    chain.load_state_dict(other.state_dict())
    assert_same_state(chain.state_dict(), other.state_dict())
    values = {n: v.contiguous() for n, v in other.state_dict().items()}
    save_file(values, tmp_path / "m.safetensors")
    chain = tg.GraphChain(made(own), weights=tmp_path / "m.safetensors", placement=[1, 0, 1])
    assert_same_state(chain.state_dict(), other.state_dict())


def test_caching_on_the_driver_is_refused(client, x):
    chain = tg.GraphChain(made(norms))
    with parametrize.cached():
        with pytest.raises(tg.TaskgradError, match=r"cached\(\).*forward of a module"):
            chain(x)
        with pytest.raises(tg.TaskgradError, match="cached"):
            tg.spawn(made(norms), x)
        with pytest.raises(tg.TaskgradError, match="cached"):
            tg.map(made(norms), [x])
        tg.spawn(nn.Linear(6, 2), x)


def test_parametrized_values_that_only_a_constructor_makes(client):
    chain = tg.GraphChain(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3))))
    state = chain.state_dict()
    magnitude = state["0.parametrizations.weight.original0"]
    direction = state["0.parametrizations.weight.original1"]
    assert direction.abs().sum() > 0
    torch.testing.assert_close(magnitude, direction.norm(dim=1, keepdim=True))


def test_a_scripted_module_is_refused(client):
    with pytest.raises(TypeError, match="layer '0'.*ScriptModule.*the module that it was made"):
        tg.GraphChain(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))


def test_a_compiled_layer_travels(client, x):
    model = nn.Sequential(torch.compile(nn.Linear(6, 2), backend="eager"))
    chain = tg.GraphChain(model)
    assert_same(tg.collect(chain(x)).detach(), model(x).detach())
    assert list(chain.state_dict()) == list(model.state_dict())
    assert F.mse_loss(chain.to_module()(x), model(x)) == 0
