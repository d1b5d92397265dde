"""Steps that cannot be compiled: one sentence says why, and they run as tasks, to the same bits."""

from __future__ import annotations

import gc
import logging
from functools import partial

import dask
import dask.array as da
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import keys_of, wait_until
from plain import ConvNet, PlainTrainer, assert_same_training, images
from taskgrad.cluster.channels.dask_comms import DaskChannels
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.executors import program_comms
from test_compiled import before_a_trainer, threads_and_ports

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=0.1)
PLACEMENT = [0] * 5 + [1] * 5


def assert_runs_as_tasks(client, caplog, reason: str, deadline: str = "2m") -> str:
    """A trainer that begins now says this, once, and trains as plain torch does; what it said."""
    chain = tg.GraphChain(ConvNet(), client=client, placement=PLACEMENT)
    options = {"microbatches": 4, "clip_norm": 0.5}
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, schedule="zb_h1", **options)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, **options)
    tasks = keys_of(client, "forward")
    (x, y), *rest = images(4)
    with caplog.at_level(logging.INFO, "taskgrad"):
        with dask.config.set({"taskgrad.answer-deadline": deadline}):
            losses = [trainer.step(x, y)]
        losses += [trainer.step(x, y) for x, y in rest]
    assert [loss.item() for loss in losses] == plain.train(images(4))
    assert_same_training(chain, plain, client)
    assert len(keys_of(client, "forward") - tasks) == 4 * 4 * 2
    assert all("waiting" not in loss.report for loss in losses)
    warnings = [r for r in caplog.records if r.name == "taskgrad" and r.levelname == "WARNING"]
    [message] = [record.getMessage() for record in warnings]
    assert message.startswith("taskgrad runs these steps as Dask tasks: ")
    assert reason in message
    assert ". " not in message  # it is one sentence
    return message


async def unreachable(address, *args, **kwargs):
    raise OSError(f"no route to {address}")


def test_a_driver_that_reaches_no_worker(client, caplog, monkeypatch):
    before = before_a_trainer(client)
    monkeypatch.setattr(program_comms, "connect", unreachable)
    message = assert_runs_as_tasks(client, caplog, "the workers cannot be reached: ")
    assert "reached: no route to tcp://" in message
    gc.collect()
    assert wait_until(lambda: client.run(threads_and_ports) == before)


def cut_off(*channels: type, dask_worker) -> None:
    """Let no channels of these kinds connect from now on."""

    def connect(*args):
        raise OSError("no route to the others")

    dask_worker.connect_in_test = {kind: kind.connect for kind in channels}
    for kind in channels:
        kind.connect = connect


def join_again(dask_worker) -> None:
    for kind, connect in dask_worker.connect_in_test.items():
        kind.connect = connect


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_does_not_reach_the_others(client, caplog, rank):
    before = before_a_trainer(client)
    chain = tg.GraphChain(ConvNet(), client=client, placement=PLACEMENT)
    worker = chain.placement[5 * rank].worker
    del chain
    client.run(cut_off, SocketChannels, DaskChannels, workers=[worker])
    try:
        assert_runs_as_tasks(client, caplog, "the workers cannot be reached: ", "6s")
    finally:
        client.run(join_again, workers=[worker])
    gc.collect()
    assert wait_until(lambda: client.run(threads_and_ports) == before, 10)


def test_workers_that_reach_each_other_by_dasks_connections_only(client, caplog):
    """A firewall, say, that lets the workers' own ports pass."""
    before = before_a_trainer(client)
    client.run(cut_off, SocketChannels)
    try:
        chain = tg.GraphChain(ConvNet(), client=client, placement=PLACEMENT)
        trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=4, schedule="zb_h1")
        plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4)
        with (
            caplog.at_level(logging.INFO, "taskgrad"),
            dask.config.set({"taskgrad.answer-deadline": "6s"}),
        ):
            losses = [trainer.step(x, y) for x, y in images(4)]
        assert [loss.item() for loss in losses] == plain.train(images(4))
        assert_same_training(chain, plain, client)
        assert "over Dask's own connections" in caplog.text
        assert all("waiting" in loss.report for loss in losses)
        assert client.run(threads_and_ports) == before
    finally:
        client.run(join_again)


def test_batches_here_and_then_on_workers_that_several_take(client, caplog):
    """A program for batches of the same shape is there already."""
    torch.manual_seed(0)

    def made() -> tuple[tg.GraphChain, tg.Trainer]:
        torch.manual_seed(0)
        fan = tg.Parallel(torch.add, nn.Linear(4, 4), nn.Linear(4, 4))
        model = nn.Sequential(fan, nn.Linear(4, 1))
        chain = tg.GraphChain(model, client=client, placement=[0, 1, 0, 0])
        return chain, tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)

    (chain, trainer), (other, expected) = made(), made()
    x, y = torch.randn(4, 4), torch.randn(4, 1)
    there = [da.from_array(t.numpy(), chunks=(2, -1)) for t in (x, y)]
    for batch in [(x, y), (x, y), there, (x, y)]:
        assert trainer.step(*batch).item() == expected.step(x, y).item()
    assert "several of them take the model's input" in caplog.text
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in chain.state_dict().items())
