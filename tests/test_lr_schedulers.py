"""The learning rate moves with the optimizer, or with the validation loss, on all stages alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as torchs
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import taskgrad as tg
from helpers import long
from taskgrad.cluster.worker_plugin import store_of

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
DECAY = partial(StepLR, step_size=1, gamma=0.1)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def batch(seed=0, size=6):
    torch.manual_seed(10 + seed)
    return torch.randn(size, 4), torch.randn(size, 1)


def two_stages(loss=F.mse_loss, optimizer=SGD, **options):
    chain = tg.GraphChain(make(), placement=[0, 1])
    return tg.Trainer(chain, loss, optimizer, **options)


def _rates(tokens, dask_worker):
    return [
        (
            [group["lr"] for group in stage.optimizer.param_groups],
            stage.training.scheduler.last_epoch,
        )
        for token, stage in store_of(dask_worker).entries().items()
        if token in tokens
    ]


def rates(trainer):
    """(learning rates, the scheduler's count of steps), the same on both stages."""
    trainer.wait()
    tokens = {stage.token for stage in trainer.chain.layout.shards}
    found = trainer.chain.layout.session.client.run(_rates, tokens)
    [first], [second] = found.values()
    assert first == second
    return first


# -- with the optimizer ----------------------------------------------------------------------------


def scaled_loss(output, target):
    return (output.float() * target).mean()


LARGE, SMALL = torch.full((8, 1), 1e30), torch.full((8, 1), 1e-3)


@pytest.mark.parametrize(
    ("targets", "accumulate", "moves"),
    [
        ([LARGE, SMALL, LARGE, SMALL], 1, [0, 1, 1, 2]),
        ([SMALL, LARGE, SMALL, SMALL], 2, [0, 0, 0, 1]),
    ],
)
def test_a_skipped_step_does_not_move_it(client, targets, accumulate, moves):
    torch.manual_seed(1)
    x = torch.randn(8, 4)
    trainer = two_stages(scaled_loss, lr_scheduler=DECAY, amp="fp16", accumulate=accumulate)
    for i, target in enumerate(targets):
        trainer.step(x, target).item()
        assert rates(trainer) == ([0.1 ** moves[i]], moves[i])
    assert trainer.steps == 4


class OnlyHereTooLarge(nn.Module):
    """Its own gradient overflows, and no other's."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.by.half().float() * 1e9 * (x.detach() * 0 + 1)


def test_a_step_that_one_stage_skips_moves_no_scheduler(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(4, 1), OnlyHereTooLarge()), placement=[0, 1])
    trainer = tg.Trainer(chain, scaled_loss, SGD, lr_scheduler=DECAY, amp="fp16")
    before = chain.state_dict()
    assert trainer.step(torch.randn(8, 4), torch.ones(8, 1)).report["skipped"]
    assert rates(trainer) == ([1.0], 0)
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def growing(step):
    return 1 + 0.1 * step


def sequence(optimizer):
    parts = [torchs.ConstantLR(optimizer, 0.5, 2), torchs.ExponentialLR(optimizer, 0.9)]
    return torchs.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer):
    return torchs.ChainedScheduler(
        [torchs.LinearLR(optimizer, 0.1, total_iters=3), StepLR(optimizer, 2, gamma=0.5)]
    )


class Own:
    """No scheduler of torch's: halves what there is."""

    last_epoch = 0

    def __init__(self, optimizer):
        self.groups = optimizer.param_groups

    def step(self):
        self.last_epoch += 1
        for group in self.groups:
            group["lr"] *= 0.5

    def state_dict(self):
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state):
        self.last_epoch = state["last_epoch"]


KINDS = {
    "sequence": sequence,
    "chained": chained,
    "lambdas": partial(LambdaLR, lr_lambda=[growing, lambda step: 0.5**step]),
    "one cycle": partial(torchs.OneCycleLR, max_lr=[0.1, 0.2], total_steps=20),
    "cyclic": partial(torchs.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "restarts": partial(torchs.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "own": Own,
}


@pytest.mark.parametrize("kind", [*list(KINDS)[:2], *long(*list(KINDS)[2:])])
def test_schedulers_are_plain_torchs_also_from_a_checkpoint(client, tmp_path, kind):
    factory = KINDS[kind]
    groups = {"*.bias": {"lr": 0.3}}
    model = make()
    optimizer = SGD(
        [
            {"params": [p for n, p in model.named_parameters() if not n.endswith("bias")]},
            {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "lr": 0.3},
        ]
    )
    scheduler = factory(optimizer)
    trainer = two_stages(lr_scheduler=factory, param_groups=groups)
    for i in range(6):
        if i == 3:
            trainer.save(tmp_path)
            chain = tg.GraphChain(make(), placement=[1, 0])
            trainer = tg.Trainer.restore(tmp_path, chain, F.mse_loss, SGD, lr_scheduler=factory)
        trainer.step(*batch(i))
        x, t = batch(i)
        F.mse_loss(model(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    trainer.wait()
    if kind != "chained":  # has no count of its own
        assert rates(trainer) == ([g["lr"] for g in optimizer.param_groups], scheduler.last_epoch)
    state = trainer.chain.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


# -- with the validation loss ----------------------------------------------------------------------

PLATEAU = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.2)


class Warmer(ReduceLROnPlateau):
    """Also a plateau if its metric may be left out."""

    def step(self, metrics=None):
        super().step(metrics)


class Mine:
    """A scheduler of the user's own that takes a metric."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.last_epoch = 0

    def step(self, loss):
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = loss / 10

    def state_dict(self):
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state):
        vars(self).update(state)


@pytest.mark.parametrize("factory", [PLATEAU, *long(partial(Warmer, patience=0), Mine)])
def test_a_scheduler_that_needs_a_metric_gets_the_validation_loss(client, tmp_path, factory):
    train, val = [batch(0), batch(1)], [batch(2, 5), batch(3, 2)]
    model = make()
    optimizer = SGD(model.parameters(), lr=0.5)
    scheduler = factory(optimizer)
    sgd = partial(SGD, lr=0.5)
    trainer = two_stages(optimizer=sgd, lr_scheduler=factory)
    seen = []
    for epoch in range(6):
        for x, t in train:
            F.mse_loss(model(x), t).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            parts = [(F.mse_loss(model(x), t).item(), len(x)) for x, t in val]
        loss = sum(of * n for of, n in parts) / 7
        scheduler.step(loss)
        if epoch == 3:
            trainer.save(tmp_path)
            chain = tg.GraphChain(make(), placement=[1, 0])
            trainer = tg.Trainer.restore(tmp_path, chain, F.mse_loss, sgd, lr_scheduler=factory)
        [found] = trainer.fit(train, 1, val, progress=False)
        assert found["val_loss"] == loss
        assert rates(trainer) == ([g["lr"] for g in optimizer.param_groups], scheduler.last_epoch)
        seen.append(optimizer.param_groups[0]["lr"])
    assert len(set(seen)) > 1


def test_without_a_metric_it_is_refused_before_anything_changes(client):
    trainer = two_stages(lr_scheduler=PLATEAU)
    before = trainer.chain.state_dict()
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.*needs a val_loader"):
        trainer.fit([batch()], progress=False)
    with pytest.raises(tg.TaskgradError, match=r"ReduceLROnPlateau.*step\(\) has none to give"):
        trainer.step(*batch())
    assert trainer.steps == 0
    after = trainer.chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.fit([batch()], 1, [batch()], progress=False)
    assert trainer.steps == 1


class RaisesOnOne(Mine):
    """On the stage of the last layer, whose weight has one row, after it has changed the rate."""

    def step(self, loss):
        super().step(loss)
        if self.last_epoch == 2 and self.optimizer.param_groups[0]["params"][0].shape[0] == 1:
            raise ArithmeticError("no more")


def test_a_scheduler_that_raises_on_one_stage_moves_on_none(client):
    trainer = two_stages(lr_scheduler=RaisesOnOne)
    trainer.fit([batch()], 1, [batch()], progress=False)
    before = rates(trainer)
    with pytest.raises(tg.LayerError, match="lr_scheduler on .* ArithmeticError.*no more"):
        trainer.fit([batch()], 1, [batch()], progress=False)
    assert rates(trainer) == before
    assert trainer.steps == 2


class Around:
    """Hands nothing on to the scheduler in it."""

    def __init__(self, optimizer):
        self.inner = PLATEAU(optimizer)

    def step(self):
        self.inner.step()


def test_a_plateau_in_a_chain_is_refused(client):
    def both(optimizer):
        return torchs.ChainedScheduler([DECAY(optimizer), PLATEAU(optimizer)])

    with pytest.raises(tg.LayerError, match="does not support `ReduceLROnPlateau`"):
        two_stages(lr_scheduler=both)
    with pytest.raises(tg.LayerError, match="gave a Around with a ReduceLROnPlateau in it"):
        two_stages(lr_scheduler=Around)
    with pytest.raises(tg.LayerError, match='mode="max"; it is given .val_loss.'):
        two_stages(lr_scheduler=partial(ReduceLROnPlateau, mode="max"))
