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
