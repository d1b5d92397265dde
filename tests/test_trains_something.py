"""A training that would train nothing, or something else, says so before anything has changed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import taskgrad as tg
from helpers import long

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.1)
OWN = [nn.Parameter(torch.ones(3, 3))]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 4), torch.randn(6, 1)


def assert_unchanged(chain, before):
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# -- losses ----------------------------------------------------------------------------------------


def without_grad(output, target):
    with torch.no_grad():
        return F.mse_loss(output, target)


def only_of_some(output, target):
    return F.mse_loss(output, target) if (target < 0).all() else torch.zeros(())


LOSSES = {
    "detached": lambda y, t: F.mse_loss(y.detach(), t),
    "detached after": lambda y, t: F.mse_loss(y, t).detach(),
    "constant": lambda y, t: torch.tensor(1.0),
    "no_grad": without_grad,
    "a number": lambda y, t: F.mse_loss(y, t).item(),
    "made anew": lambda y, t: torch.tensor(F.mse_loss(y, t).item(), requires_grad=True),
    "made anew, scaled": lambda y, t: torch.tensor(F.l1_loss(y, t).item(), requires_grad=True) * 2,
    "rounded": lambda y, t: (y > t).float().mean(),
    "integer": lambda y, t: (y > t).sum(),
    "bool": lambda y, t: (y > t).any(),
    "complex": lambda y, t: torch.complex(y, t).sum(),
    "several": lambda y, t: (F.mse_loss(y, t), y),
    "none": lambda y, t: None,
    "only some microbatches": only_of_some,
}


@pytest.mark.parametrize("loss", [*list(LOSSES)[:3], *long(*list(LOSSES)[3:])])
def test_a_loss_that_trains_nothing(client, loss):
    chain = tg.GraphChain(make(), placement=[0, 0, 1])
    before = chain.state_dict()
    trainer = tg.Trainer(chain, LOSSES[loss], SGD, microbatches=2)
    x, t = batch()
    t = t.abs() * torch.tensor([-1.0, -1, -1, 1, 1, 1])[:, None]  # one microbatch below zero
    with pytest.raises(tg.LayerError, match="layer 'loss'.* step 0.*(a loss is one|not depend on)"):
        trainer.step(x, t).item()
    assert trainer.steps == 0
    assert_unchanged(chain, before)


def test_parts_that_are_not_trained_are_no_error(client):
    """As in plain torch: a frozen part, one behind a detach, one that a step does not use."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x).detach()

    model = nn.Sequential(Part(), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    plain = copy.deepcopy(model)
    chain = tg.GraphChain(model, placement=[0, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    optimizer = SGD([p for p in plain.parameters() if p.requires_grad])
    x, t = batch()
    loss = F.mse_loss(plain(x), t)
    loss.backward()
    optimizer.step()
    assert trainer.step(x, t).item() == loss.item()
    assert_unchanged(chain, plain.state_dict())


# -- optimizers and schedulers ---------------------------------------------------------------------


def copies(parameters):
    return SGD([nn.Parameter(p.detach().clone()) for p in parameters])


def only_here(parameters):
    """Something else where there is no example of 8 by 8."""
    return SGD(parameters if parameters[0].shape == (8, 8) else OWN)


def weights_only(parameters):
    return SGD([p for p in parameters if p.dim() > 1])


def one_more(parameters):
    return SGD([*parameters, *OWN])


def class_there(parameters):
    return SGD(parameters) if parameters[0].shape == (8, 8) else torch.optim.SGD


def nothing_there(parameters):
    return SGD(parameters) if parameters[0].shape == (8, 8) else None


def raises_there(parameters):
    if parameters[0].shape == (1, 3):  # the last layer's
        raise ArithmeticError("not these")
    return SGD(parameters)


OPTIMIZERS = {
    "copies": (copies, TypeError, "made of other parameters"),
    "closed over": (lambda _: SGD(OWN), TypeError, "made of other parameters"),
    "closed over, there": (only_here, tg.LayerError, "1 tensors that are not the model's"),
    "one more": (one_more, tg.LayerError, "1 tensors that are not the model's"),
    "fewer": (weights_only, tg.LayerError, r"leaves out 1 of the 2 .*\(\d.bias\)"),
    "a class": (class_there, tg.LayerError, "it gave the class SGD"),
    "none": (nothing_there, tg.LayerError, "it gave a NoneType"),
    "raises": (raises_there, tg.LayerError, "not these"),
}


def other_optimizers(optimizer):
    return StepLR(SGD(OWN), 1)


class Holds:
    def __init__(self, optimizer):
        self.inner = other_optimizers(optimizer)

    def step(self):
        self.inner.step()


class NeedsTwo:
    def __init__(self, optimizer):
        pass

    def step(self, loss, accuracy):
        pass


SCHEDULERS = {
    "none": (lambda optimizer: None, tg.LayerError, "it gave a NoneType"),
    "a class": (lambda optimizer: StepLR, tg.LayerError, "it gave the class StepLR"),
    "without its arguments": (StepLR, tg.LayerError, "step_size"),
    "the optimizer itself": (lambda optimizer: optimizer, tg.LayerError, "it gave a SGD"),
    "no scheduler": (lambda optimizer: optimizer.param_groups, tg.LayerError, "it gave a list"),
    "of another": (other_optimizers, tg.LayerError, "is of another optimizer"),
    "of another, inside": (Holds, tg.LayerError, "is of another optimizer"),
    "two metrics": (NeedsTwo, tg.LayerError, "needs loss, accuracy"),
}

WRONG = {
    **{f"optimizer, {name}": (of[0], {}, *of[1:]) for name, of in OPTIMIZERS.items()},
    **{f"scheduler, {n}": (SGD, {"lr_scheduler": of[0]}, *of[1:]) for n, of in SCHEDULERS.items()},
    "group": (SGD, {"param_groups": {"*": {"params": []}}}, ValueError, "has an option 'params'"),
    "compile": (SGD, {"compile": {"backend": "aot_eager", "dyn": 1}}, tg.LayerError, "dyn"),
}


def test_what_a_trainer_refuses_it_refuses_before_anything_has_changed(client):
    """A trainer that was made before goes on as if there had been no other."""
    chain, other = (tg.GraphChain(make(), placement=[0, 0, 1]) for _ in range(2))
    momentum = partial(SGD, momentum=0.9)
    trainer, undisturbed = (tg.Trainer(c, F.mse_loss, momentum) for c in (chain, other))
    for what, (optimizer, options, error, message) in WRONG.items():
        before = chain.state_dict()
        with pytest.raises(error, match=message):
            tg.Trainer(chain, F.l1_loss, optimizer, **options)
        assert_unchanged(chain, before)
        assert trainer.step(*batch()).item() == undisturbed.step(*batch()).item(), what
    assert_unchanged(chain, other.state_dict())


def test_an_optimizer_alone_is_checked_too(client):
    chain = tg.GraphChain(make(), placement=[0, 0, 1])
    optimizer = tg.Optimizer(chain, SGD)
    for factory in (copies, only_here, weights_only, one_more, class_there, nothing_there):
        with pytest.raises((TypeError, tg.LayerError), match=r"the optimizer (or|is made)"):
            tg.Optimizer(chain, factory)
    with pytest.raises(tg.LayerError, match="not these"):
        tg.Optimizer(chain, raises_there)
    x, t = batch()
    tg.spawn(F.mse_loss, chain(x), t).backward()
    optimizer.step()
    plain = make()
    F.mse_loss(plain(x), t).backward()
    SGD(plain.parameters()).step()
    assert_unchanged(chain, plain.state_dict())


def test_of_two_trainers_of_a_chain_the_later_one_trains(client, tmp_path):
    """The steps of the earlier one are finished first; it says that it is replaced."""
    chain = tg.GraphChain(make(), placement=[0, 0, 1])
    first = tg.Trainer(chain, F.mse_loss, SGD)
    losses = [first.step(*batch()) for _ in range(3)]
    second = tg.Trainer(chain, F.mse_loss, SGD)
    after = second.step(*batch()).item()
    plain = make()
    optimizer = SGD(plain.parameters())
    expected = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(plain(batch()[0]), batch()[1])
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
    assert [loss.item() for loss in losses] == expected[:3]
    assert after == expected[3]
    for call in (partial(first.step, *batch()), partial(first.save, tmp_path)):
        with pytest.raises(tg.TaskgradError, match="has another Trainer or Optimizer"):
            call()
    alone = tg.Optimizer(chain, SGD)
    with pytest.raises(tg.TaskgradError, match="since this Trainer"):
        second.step(*batch())
    tg.Trainer(chain, F.mse_loss, SGD)
    with pytest.raises(tg.TaskgradError, match="since this Optimizer"):
        alone.step()
    assert_unchanged(chain, plain.state_dict())
