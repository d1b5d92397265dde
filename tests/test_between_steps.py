"""What uses a chain from outside its trainer is of one moment: after the steps given so far."""

from __future__ import annotations

import time
from functools import partial

import dask
import pytest
import torch
from torch import nn

import taskgrad as tg

pytestmark = pytest.mark.usefixtures("executor")


class Slow(nn.Module):
    """Adds its parameter, which becomes the number of steps; takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x + self.weight


X = torch.zeros(2, 1)


@pytest.fixture(params=[(0.05, 0.0), (0.0, 0.05)], ids=["slow first", "slow last"])
def trainer(client, request):
    chain = tg.GraphChain(nn.Sequential(*map(Slow, request.param)), placement="round_robin")
    return tg.Trainer(chain, minus_mean, partial(torch.optim.SGD, lr=1.0))


def minus_mean(output, targets):
    return -output.mean()


def weights(state):
    return [value.item() for value in state.values()]


def test_state_and_outputs(trainer):
    chain = trainer.chain
    for step in range(1, 4):
        trainer.step(X, X)
        assert weights(chain.state_dict()) == [step, step]
    trainer.step(X, X)
    assert weights(chain.to_module().state_dict()) == [4, 4]
    trainer.step(X, X)
    assert tg.collect(chain(X)).tolist() == [[10], [10]]
    trainer.step(X, X)
    assert dask.compute(chain(X))[0].tolist() == [[12], [12]]


def test_an_output_on_its_way_is_of_the_steps_before_it(trainer):
    trainer.step(X, X)
    output = trainer.chain(X).persist()
    trainer.step(X, X)
    trainer.step(X, X)
    assert tg.collect(output).tolist() == [[2], [2]]


def test_a_state_that_is_loaded_stays(trainer):
    trainer.step(X, X)
    trainer.step(X, X)
    trainer.chain.load_state_dict({"0.weight": torch.zeros(1), "1.weight": torch.ones(1)})
    trainer.wait()
    assert weights(trainer.chain.state_dict()) == [0, 1]
    trainer.step(X, X)
    assert weights(trainer.chain.state_dict()) == [1, 2]


def test_gradients_of_batches_that_accumulate(client):
    chain = tg.GraphChain(nn.Sequential(Slow(0.05), Slow(0.0)), placement="round_robin")
    trainer = tg.Trainer(chain, minus_mean, partial(torch.optim.SGD, lr=1.0), accumulate=4)
    for step in range(1, 4):
        trainer.step(X, X)
        grads = tg.collect(chain.grads())
        assert weights(grads) == [-step / 4, -step / 4]
    chain.zero_grad()
    assert list(tg.collect(chain.grads()).values()) == [None, None]


def test_a_step_that_failed_is_the_error_of_what_comes_after_it_once(trainer):
    trainer.step(X, X)
    trainer.step(X, X)
    bad = trainer.step({"no": X}, X)
    with pytest.raises(tg.LayerError, match="step 2"):
        trainer.chain.state_dict()
    with pytest.raises(tg.LayerError, match="step 2"):
        bad.item()
    assert weights(trainer.chain.state_dict()) == [2, 2]


class NotSent:
    def __reduce__(self):
        raise RuntimeError("it stays here")


def test_a_batch_that_cannot_be_sent_leaves_the_steps_before_it_alone(trainer):
    loss = trainer.step(X, X)
    with pytest.raises(RuntimeError, match="it stays here") as caught:
        trainer.step(X, (X, NotSent()))
    assert "batch of step 1 cannot be sent" in caught.value.__notes__[0]
    assert trainer.steps == 1
    assert loss.item() == 0
    trainer.step(X, X)
    assert weights(trainer.chain.state_dict()) == [2, 2]
