"""Deferred batch norm: the running statistics of plain torch over the whole batch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from helpers import long_rows

pytestmark = pytest.mark.usefixtures("executor")

STILL = partial(torch.optim.SGD, lr=0.0)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ChannelsLast(nn.BatchNorm1d):
    """Takes (n, length, channels); here length and channels are one number."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Renamed(nn.BatchNorm1d):
    """Calls the function itself, as norms with an activation of their own do."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
        )
        return F.relu(y)


class Twice(nn.Module):
    """One batch norm for two values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x) + self.norm(x.square() + 3)


def assert_statistics(state, plain, rtol=1e-5):
    for name, expected in plain.state_dict().items():
        if name.endswith(STATISTICS):
            torch.testing.assert_close(state[name], expected, rtol=rtol, atol=1e-7, msg=name)


def trained(make, batches, microbatches=4, placement=(0, 1), **options):
    """The chain's state after these batches, and a plain model that saw each of them as a whole."""
    torch.manual_seed(0)
    plain = make()
    chain = tg.GraphChain(copy.deepcopy(plain), placement=list(placement))
    options = {"microbatches": microbatches, "deferred_batch_norm": True, **options}
    trainer = tg.Trainer(chain, F.mse_loss, STILL, **options)
    for x in batches:
        trainer.step(x, torch.zeros_like(plain(x))).item()
    return chain.state_dict(), plain


def batches(*shape, steps=2, mean=1.0, std=2.0):
    torch.manual_seed(1)
    return [mean * (1 + step) + std * torch.randn(shape) for step in range(steps)]


@pytest.mark.parametrize(("mean", "std"), [(5000.0, 0.5), (-1e5, 3.0)])
def test_statistics_of_values_far_from_zero(client, mean, std):
    def make():
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    xs = batches(250, 4, mean=mean, std=std)
    state, plain = trained(make, xs, 4)
    exact = nn.Sequential(nn.BatchNorm1d(4)).double()
    for x in xs:
        exact(x.double())
    assert_statistics(state, exact.float())
    assert_statistics(state, plain, rtol=0.01)  # whose own error is larger than ours


def test_microbatches_of_different_statistics_and_sizes(client):
    """Sorted data: what lies between the microbatches is most of the variance."""
    x = torch.linspace(-1000, 1000, 44).reshape(11, 4) ** 3

    def make():
        return nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 1))

    for microbatches in (1, 3, 5):
        state, plain = trained(make, [x], microbatches)
        assert_statistics(state, plain)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (partial(nn.BatchNorm1d, 3), (9, 3, 5)),
        (partial(nn.BatchNorm2d, 3), (9, 3, 2, 4)),
        (partial(nn.BatchNorm3d, 3), (9, 3, 2, 2, 3)),
        (partial(nn.BatchNorm2d, 3), (3, 3, 4, 4)),  # microbatches of one sample
        (partial(nn.BatchNorm1d, 4, momentum=None), (9, 4)),
        (partial(nn.BatchNorm1d, 4, momentum=0.0), (9, 4)),
        (partial(nn.BatchNorm1d, 4, affine=False, track_running_stats=False), (9, 4)),
        (partial(ChannelsLast, 4), (9, 4, 4)),
        (partial(Renamed, 4), (9, 4)),
        (Twice, (9, 4)),
    ],
)
def test_kinds_of_batch_norm(client, norm, shape):
    def make():
        return nn.Sequential(norm(), nn.Tanh(), Scale())

    state, plain = trained(make, batches(*shape), 3, (0, 0, 1))
    assert_statistics(state, plain)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.by * x


def normalized(model, norm, xs, microbatches):
    """What a batch norm was given in each of its calls, of the microbatches together."""
    inputs = []
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for part in xs.tensor_split(microbatches):
        model(part)
    handle.remove()
    calls = len(inputs) // microbatches
    return [torch.cat(inputs[i::calls]) for i in range(calls)]


class Checkpointed(nn.Module):
    """Runs its own part again in the backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def once():
    return nn.Sequential(Scale(), nn.BatchNorm1d(4, momentum=0.5), Scale(), nn.Linear(4, 4))


def at_two_places():
    norm = nn.BatchNorm1d(4, momentum=0.5)
    return nn.Sequential(norm, Scale(), nn.Linear(4, 4), norm, Scale())


def checkpointed():
    return nn.Sequential(Scale(), Checkpointed(once()), Scale())


@pytest.mark.parametrize(
    ("make", "placement", "options"),
    [
        (at_two_places, (0, 0, 1, 0, 1), {}),
        (at_two_places, (0, 0, 0, 0, 1), {"checkpoint": "always"}),
        (once, (0, 0, 1, 1), {"checkpoint": "always"}),
        (once, (0, 0, 1, 1), {"accumulate": 2}),
        (checkpointed, (0, 0, 1), {"checkpoint": "always"}),
    ],
)
def test_each_call_moves_the_statistics_once_a_step(client, make, placement, options):
    """Wherever the batch norm is, however often it runs again, whatever lies between its calls."""
    torch.manual_seed(0)
    plain = make()
    start = copy.deepcopy(plain)
    [norm] = {m for m in plain.modules() if isinstance(m, nn.BatchNorm1d)}
    whole = copy.deepcopy(norm)
    xs = batches(10, 4, steps=3)
    for x in xs:
        for given in normalized(plain, norm, x, 3):
            whole(given)
    chain = tg.GraphChain(start, placement=list(placement))
    options = {"microbatches": 3, "deferred_batch_norm": True, **options}
    trainer = tg.Trainer(chain, F.mse_loss, STILL, **options)
    for x in xs:
        trainer.step(x, torch.zeros(10, 4)).item()
    state = chain.state_dict()
    for name in STATISTICS:
        for found in (value for key, value in state.items() if key.endswith(name)):
            torch.testing.assert_close(found, getattr(whole, name))


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.bfloat16, 1e-2), *long_rows((torch.float64, 1e-12), (torch.float16, 1e-3))],
)
def test_dtypes(client, dtype, rtol):
    def make():
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)

    xs = [x.to(dtype) for x in batches(64, 4, mean=20.0)]
    chain = tg.GraphChain(make(), placement=[0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, STILL, microbatches=4, deferred_batch_norm=True)
    for x in xs:
        trainer.step(x, torch.zeros(64, 1, dtype=dtype)).item()
    norm = nn.BatchNorm1d(4).double()
    for x in xs:
        norm(x.double())
    state = chain.state_dict()
    for name in STATISTICS[:2]:
        assert state[f"0.{name}"].dtype == dtype
        torch.testing.assert_close(
            state[f"0.{name}"].double(), getattr(norm, name), rtol=rtol, atol=0
        )


@pytest.mark.long
def test_layers_are_as_before_and_frozen_norms_stay(client):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    def make():
        return nn.Sequential(Frozen(4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    chain = tg.GraphChain(make(), placement=[0, 0, 1])
    before = chain.state_dict()
    trainer = tg.Trainer(chain, F.mse_loss, STILL, microbatches=2, deferred_batch_norm=True)
    with pytest.raises(tg.LayerError, match="more than 1 value per channel"):
        trainer.step(torch.randn(2, 4), torch.zeros(2, 1)).item()
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.step(torch.randn(8, 4), torch.zeros(8, 1)).item()
    after = chain.state_dict()
    assert all(torch.equal(after[f"0.{n}"], before[f"0.{n}"]) for n in STATISTICS)
    assert after["1.num_batches_tracked"] == 1
    module = chain.to_module()
    assert not module[1]._forward_pre_hooks
    assert not module[1]._forward_hooks
