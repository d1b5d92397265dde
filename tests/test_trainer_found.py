"""Faults that the first users of the Trainer found; each stays away."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import taskgrad as tg
from taskgrad.cluster.session import session

pytestmark = pytest.mark.usefixtures("executor")


def test_no_worker_is_gone_when_the_client_refreshes_what_it_knows(client, monkeypatch):
    """Every 2 s the client asks the scheduler for everything but the workers."""
    ours = session(client)
    addresses = {worker.address for worker in ours.workers()}
    ask = client._update_scheduler_info

    async def ask_and_refresh(n_workers=0):
        await ask(n_workers=n_workers)
        await ask()

    monkeypatch.setattr(client, "_update_scheduler_info", ask_and_refresh)
    assert not client.scheduler_info(n_workers=-1)["workers"]
    assert ours.out_of_order(addresses) == {}
    assert {worker.address for worker in ours.workers()} == addresses


def test_a_scheduler_that_has_no_more_steps(client):
    """It is the last thing in a step, and all of the step is taken back."""
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), placement=[0, 1])
    trainer = tg.Trainer(
        chain,
        nn.functional.mse_loss,
        functools.partial(torch.optim.SGD, momentum=0.9),
        lr_scheduler=functools.partial(OneCycleLR, max_lr=0.1, total_steps=2),
    )
    x, t = torch.randn(4, 2), torch.randn(4, 1)
    for _ in range(2):
        trainer.step(x, t).item()
    before = chain.state_dict()
    with pytest.raises(tg.TaskgradError, match=r"lr_scheduler on .* step 2: .* 3 times"):
        trainer.step(x, t).item()
    assert trainer.steps == 2
    after = chain.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # on both workers


def test_a_message_to_a_worker_that_closes(fresh):
    """It ended the worker's stream with a KeyError."""
    client = fresh(n_workers=1)
    tg.GraphChain(nn.Linear(1, 1), client=client)

    def close_and_tell(dask_worker):
        dask_worker.plugins["taskgrad"].teardown(dask_worker)
        dask_worker.stream_handlers["taskgrad-release"](keys=["of a task"])

    client.run(close_and_tell)
