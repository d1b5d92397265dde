"""Layers that change what they consist of while they train, or between two calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from plain import PlainTrainer, assert_same_training
from taskgrad.worker.stage_modules import Members, StageModules

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def fresh(module: nn.Module) -> Members:
    return StageModules([module], dict(module.named_parameters())).members()


def assert_found(stage: StageModules, module: nn.Module) -> None:
    """The stage finds what a walk over the module finds."""
    members, walk = stage.members(), fresh(module)
    for ours, theirs in zip(
        (members.modules, members.parameters, members.buffers),
        (walk.modules, walk.parameters, walk.buffers),
        strict=True,
    ):
        assert list(map(id, ours)) == list(map(id, theirs))


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))


def test_what_has_not_changed_is_not_looked_for_again():
    module = nested()
    stage = StageModules([module, torch.relu], dict(module.named_parameters()))
    assert_found(stage, module)
    members = stage.members()
    with torch.no_grad():
        module[0].weight.mul_(2)
    module[0].weight.grad = torch.ones(2, 2)
    module.eval()
    assert stage.members() is members
    assert members.trainable() == dict(module.named_parameters())
    module[0].weight.requires_grad_(False)
    assert stage.members() is members
    assert "0.weight" not in members.trainable()


def make_buffer_of_weight(m: nn.Sequential) -> None:
    """The last parameter of a module becomes its only buffer."""
    weight = m[0].weight
    del m[0].bias
    del m[0].weight
    m[0].register_buffer("weight", weight)


CHANGES = {
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(2, 2))),
    "equal parameter": lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().clone())),
    "no parameter": lambda m: m[0].register_parameter("bias", None),
    "new parameter": lambda m: m[1].register_parameter("more", nn.Parameter(torch.zeros(1))),
    "shared parameter": lambda m: setattr(m[1][1], "weight", m[0].weight),
    "buffer": lambda m: setattr(m[1][0], "running_mean", torch.ones(2)),
    "new buffer": lambda m: m[1][1].register_buffer("more", torch.zeros(1)),
    "a parameter as buffer": make_buffer_of_weight,
    "submodule": lambda m: setattr(m[1], "0", nn.LayerNorm(2)),
    "new submodule": lambda m: m[1].append(nn.Linear(2, 2)),
    "no submodule": lambda m: m[1].pop(1),
    "parametrization": lambda m: nn.utils.parametrizations.orthogonal(m[0]),
    "dictionary": lambda m: setattr(m[0], "_parameters", {"weight": nn.Parameter(torch.ones(2))}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found(change):
    module = nested()
    stage = StageModules([module], dict(module.named_parameters()))
    stage.members()
    CHANGES[change](module)
    assert_found(stage, module)
    assert_found(stage, module)


class Hides(nn.Linear):
    """Shows its bias only if told so."""

    shows = False

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            if self.shows or name != "bias":
                yield name, parameter


def test_modules_that_walk_their_own_way_are_asked_every_time():
    module = Hides(2, 2)
    stage = StageModules([module], {"weight": module.weight, "bias": module.bias})
    assert list(stage.members().trainable()) == ["weight"]
    module.shows = True
    assert list(stage.members().trainable()) == ["weight", "bias"]


class Restless(nn.Module):
    """A linear layer that changes what it consists of with each call, and back."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.part = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("seen", torch.zeros(6))
        self.change = change
        self.calls = 0

    def forward(self, x):
        if self.calls == 0:
            self.first = [self.part, self.scale]
        other = self.calls % 2 == 0
        self.calls += 1
        if self.change == "submodule":
            self.part = nn.Linear(6, 6) if other else self.first[0]
            if other:
                nn.init.constant_(self.part.weight, 0.1)
                nn.init.constant_(self.part.bias, 0.2)
        if self.change == "parameter":
            self.scale = nn.Parameter(torch.full((6,), 2.0)) if other else self.first[1]
        if self.change == "freeze":
            self.part.bias.requires_grad_(not other)
        if self.change == "register":
            name = f"inner{self.calls}"
            self.add_module(name, nn.BatchNorm1d(6))
            x = getattr(self, name)(x)
            delattr(self, name)
        self.seen = self.seen + x.detach().sum(0)
        return self.part(x) * self.scale


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("change", ["submodule", "parameter", "freeze", "register"])
def test_layers_that_change_in_their_forward_train_as_in_torch(client, change, schedule):
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), Restless(change), nn.Linear(6, 4))

    microbatches = 1 if change == "freeze" else 2  # a backward needs it as its forward found it
    chain = tg.GraphChain(make(), client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=microbatches, schedule=schedule)
    plain = PlainTrainer(make(), F.cross_entropy, SGD, microbatches=microbatches)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(6)]
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(chain, plain, client)
