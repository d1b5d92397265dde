"""A state is loaded on all workers or on none, whatever raises where."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same, long
from plain import PlainTrainer
from test_checkpoint import assert_same_everything, everything

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


class Fussy(nn.Module):
    """Refuses some states: those with a negative number, or of another mind."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen = how, []
        self.scale = nn.Parameter(torch.ones(3))
        if how == "hook":
            self.register_load_state_dict_pre_hook(refuse)

    def forward(self, x):
        return x * self.scale

    def get_extra_state(self):
        return {"how": self.how}

    def set_extra_state(self, state):
        self.seen.append(state["how"])
        if self.how == "extra state" and state["how"] != self.how:
            raise ArithmeticError("not this state")

    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(state, prefix, *args)
        if self.how == "own loading" and (state[prefix + "scale"] < 0).any():
            raise ArithmeticError("not this state")


def refuse(module, state, prefix, *args):
    if (state[prefix + "scale"] < 0).any():
        raise ArithmeticError("not this state")


def net(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Fussy("nothing"), Fussy(how))


def other(how):
    state = {n: v + 1 for n, v in net(how).state_dict().items() if isinstance(v, torch.Tensor)}
    state |= {"2._extra_state": {"how": "changed"}, "3._extra_state": {"how": "changed"}}
    return state | {"3.scale": torch.tensor([-1.0, 2, 3])}


@pytest.mark.parametrize("how", ["hook", "own loading", "extra state"])
@pytest.mark.parametrize("placement", [[0, 0, 0, 1], *long([1, 1, 1, 0])])
def test_a_state_that_one_worker_refuses_is_loaded_on_none(client, how, placement):
    chain = tg.GraphChain(net(how), client=client, placement=placement)
    before = chain.state_dict()
    with pytest.raises(tg.LayerError, match="layer '3' on worker .*: not this state") as raised:
        chain.load_state_dict(other(how))
    assert raised.value.worker == chain.placement[3].worker
    after = chain.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else True, name
    assert [layer.seen for layer in list(chain.to_module())[2:]] == [[], []]
    right = {**other("nothing"), "3.scale": torch.ones(3), "3._extra_state": {"how": how}}
    chain.load_state_dict(right)
    for name, value in right.items():
        if isinstance(value, torch.Tensor):
            assert_same(chain.state_dict()[name], value, name)
    assert chain.to_module()[2].seen == ["changed"]


def batches(n):
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(n)]


def test_a_checkpoint_that_one_worker_refuses_leaves_the_trainer_that_was(client, tmp_path):
    source = tg.GraphChain(net("changed"), client=client, placement=[0, 0, 0, 1])
    trainer = tg.Trainer(source, F.cross_entropy, ADAMW)
    trainer.step(*batches(1)[0]).item()
    trainer.save(tmp_path)
    chain = tg.GraphChain(net("extra state"), client=client, placement=[0, 0, 0, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    plain = PlainTrainer(net("extra state"), F.cross_entropy, ADAMW, microbatches=2)
    data = batches(5)
    losses = [trainer.step(x, y).item() for x, y in data[:2]]
    before = everything(trainer)
    with pytest.raises(tg.LayerError, match="set_extra_state of '3' on .* Nothing was|not this"):
        tg.Trainer.restore(tmp_path, chain, F.cross_entropy, ADAMW)
    assert_same_everything(everything(trainer), before)
    losses += [trainer.step(x, y).item() for x, y in data[2:]]
    assert losses == plain.train(data)
    plain_state = {n: v for n, v in plain.model.state_dict().items() if "_extra" not in n}
    for name, value in plain_state.items():
        assert_same(chain.state_dict()[name], value, name)


def test_groups_that_differ_leave_the_trainer_that_was(client, tmp_path):
    options = {"param_groups": {"*.bias": {"lr": 0.5}}}
    chain = tg.GraphChain(net("nothing"), client=client, placement=[0, 0, 0, 1])
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, **options)
    trainer.step(*batches(1)[0]).item()
    trainer.save(tmp_path)
    before = everything(trainer)
    with pytest.raises(tg.CheckpointError, match="are in one group of the optimizer"):
        tg.Trainer.restore(tmp_path, chain, F.cross_entropy, ADAMW, param_groups=None)
    assert_same_everything(everything(trainer), before)
    plain = PlainTrainer(net("nothing"), F.cross_entropy, ADAMW)
    assert plain.steps == 0
    assert trainer.step(*batches(1)[0]).item() > 0
    tg.Trainer.restore(tmp_path, chain, F.cross_entropy, ADAMW)
    with pytest.raises(tg.TaskgradError, match="another Trainer"):
        trainer.step(*batches(1)[0])


def test_buffers_of_a_module_that_ran_twice_are_not_half_written(client):
    norm = nn.BatchNorm1d(3)
    before = {n: b.clone() for n, b in norm.named_buffers()}
    twice = tg.spawn(norm, tg.spawn(norm, torch.randn(5, 3)))
    with pytest.raises(tg.TaskgradError, match="ran twice in one graph"):
        tg.collect(twice)
    for name, buffer in norm.named_buffers():
        assert_same(buffer, before[name], name)
