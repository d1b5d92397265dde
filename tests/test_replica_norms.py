"""Batch norm in replicas of a pipeline, and layers that replicas refuse."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn

import taskgrad as tg
from helpers import long

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def four() -> Iterator[Client]:
    """Four worker processes of one thread."""
    client = tg.local_cluster(n_workers=4, dashboard_address=":0")
    yield client
    client.close()


def test_deferred_batch_norm_is_refused(four):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=four, placement=[0])
    with pytest.raises(ValueError, match="deferred_batch_norm"):
        tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, replicas=2, deferred_batch_norm=True)


class FirstInput(nn.Module):
    """Takes its weight from the first input that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("made", torch.tensor(False))

    def forward(self, x):
        if not self.made:
            self.made.fill_(True)
            with torch.no_grad():
                self.weight.copy_(x[0])
        return x * self.weight


@pytest.mark.parametrize("checkpoint", ["never", *long("always")])
def test_a_layer_that_writes_a_parameter_is_refused(four, executor, checkpoint):
    model = nn.Sequential(FirstInput(), nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=four, placement=[0, 0])
    batch = torch.randn(4, 2), torch.randn(4, 2)
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, replicas=2, checkpoint=checkpoint)
    for _ in range(2):  # also once it writes no more
        with pytest.raises(tg.LayerError, match=r"parameter '0.weight'.*replicas=1"):
            trainer.step(*batch).item()
    tg.Trainer(chain, F.mse_loss, SGD, microbatches=2).step(*batch).item()


def test_embeddings_with_a_largest_norm_are_refused(four):
    layers = nn.Embedding(11, 2, max_norm=0.1), nn.Flatten(), nn.Linear(8, 2)
    chain = tg.GraphChain(nn.Sequential(*layers), client=four, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, replicas=2)
    with pytest.raises(tg.LayerError, match="max_norm"):
        trainer.step(torch.randint(11, (4, 4)), torch.randn(4, 2)).item()
