"""Messages between the driver of a trainer and its programs: over sockets, or over Dask."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import wait_until
from helpers import end_rank_programs
from plain import ConvNet, PlainTrainer, assert_same_training, images
from taskgrad.cluster import program_hosts
from taskgrad.cluster.channels.sockets import SocketChannels
from test_compiled import before_a_trainer, threads_and_ports
from test_pmap_failures import empty

ADAMW = torch.optim.AdamW
PLACEMENT = [0] * 5 + [1] * 5


def ways(dask_worker) -> list[str]:
    """How this worker's programs hear from their drivers."""
    hosts = program_hosts._hosts[dask_worker].named.values()
    return ["dask" if host._driver is None else "sockets" for host in hosts if host.link is None]


def test_a_driver_that_reaches_the_workers_by_dasks_connections_only(client, caplog, monkeypatch):
    """A firewall between them, say. Values still go over the workers' own sockets."""
    before = before_a_trainer(client)

    def refused(*args):
        raise OSError("no route to their ports")

    def channels(dask_worker) -> list[str]:
        named = program_hosts._hosts[dask_worker].named
        return [type(host.channels).__name__ for host in named.values()]

    monkeypatch.setattr(SocketChannels, "reach", refused)
    chain = tg.GraphChain(ConvNet(), client=client, placement=PLACEMENT)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=4)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4)
    with caplog.at_level(logging.INFO, "taskgrad"):
        losses = [trainer.step(x, y) for x, y in images(4)]
    assert [loss.item() for loss in losses] == plain.train(images(4))
    assert "no route to their ports" in caplog.text
    assert list(client.run(ways).values()) == [["dask"], ["dask"]]
    assert list(client.run(channels).values()) == [["SocketChannels"], ["SocketChannels"]]
    assert_same_training(chain, plain, client)
    del chain, trainer, losses
    gc.collect()
    assert wait_until(lambda: client.run(threads_and_ports) == before, 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_come_over_sockets(client, workers):
    """Also to one worker, which has no channels to others."""
    before_a_trainer(client)
    chain = tg.GraphChain(ConvNet(), client=client, placement=[0] * 5 + [workers - 1] * 5)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2)
    losses = [trainer.step(x, y) for x, y in images(4)]
    assert [loss.item() for loss in losses] == plain.train(images(4))
    found = [way for of_worker in client.run(ways).values() for way in of_worker]
    assert found == ["sockets"] * workers
    assert_same_training(chain, plain, client)


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.1)
        return x


def test_the_memory_of_a_large_batch_is_free_when_step_returns(client):
    """It is not all sent at once, as the program computes meanwhile."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Slow(), nn.Linear(50_000, 1), nn.Linear(1, 1))

    chain = tg.GraphChain(model(), client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, torch.optim.SGD, microbatches=2)
    plain = PlainTrainer(model(), F.mse_loss, torch.optim.SGD, microbatches=2)
    x, y = torch.empty(100, 50_000), torch.empty(100, 1)
    losses, expected = [], []
    for step in range(4):
        torch.manual_seed(step)
        x.normal_(std=1e-3)
        y.normal_()
        expected += plain.train([(x.clone(), y.clone())])
        losses.append(trainer.step(x, y))
    assert [loss.item() for loss in losses] == expected


class NotThere:
    """A part of a batch that no other process can unpickle."""

    def __init__(self) -> None:
        self.here = os.getpid()

    def __setstate__(self, state: dict[str, int]) -> None:
        if os.getpid() != state["here"]:
            raise LookupError("a file that is not here")


class TakesIt(nn.Module):
    def forward(self, x: torch.Tensor, it: object) -> torch.Tensor:
        return x


def test_a_batch_that_cannot_be_unpickled_on_a_worker(client):
    torch.manual_seed(0)
    model = nn.Sequential(TakesIt(), nn.Linear(3, 1), nn.Linear(1, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, torch.optim.SGD)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    trainer.step({"x": x, "it": None}, y).item()
    with pytest.raises(tg.TravelError, match="worker 0.*LookupError: a file that is not here"):
        trainer.step({"x": x, "it": NotThere()}, y).item()
    assert trainer.steps == 1
    trainer.step({"x": x, "it": None}, y).item()
    assert trainer.steps == 2


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_result_that_cannot_be_unpickled_here(client, size):
    """Small ones come in one piece with the message, large ones in several."""

    def call(x: torch.Tensor, fails: bool) -> object:
        return x.sum(), torch.zeros(size), NotThere() if fails else None

    f = tg.pmap(call, in_axes=(0, None), out_axes=None, client=client)
    x = torch.ones(2, 3)
    with pytest.raises(tg.TravelError, match="worker [01] .*here .*LookupError: a file"):
        f(x, True)
    assert f(x, False)[0].item() == 3


def slow_to_hear(seconds: float, dask_worker) -> None:
    """Have this worker read what drivers say so much after it is connected; 0 ends that."""
    poll = getattr(SocketChannels, "at_once", SocketChannels._poll)

    def late(self, wait):
        if 2 not in self._peers:  # after two workers
            return poll(self, wait)
        self.until = getattr(self, "until", time.monotonic() + seconds)
        if time.monotonic() < self.until:
            time.sleep(0.02)
            return False
        return poll(self, wait)

    SocketChannels.at_once = poll
    SocketChannels._poll = late if seconds else poll


@pytest.mark.parametrize("slow", [0, 1])
def test_a_call_that_fails_before_all_workers_have_heard_of_it_leaves_nothing(client, slow):
    """Messages of its ranks to such a worker are dropped there."""

    def f(x: torch.Tensor) -> torch.Tensor:
        if tg.axis_index("i") == 3:
            time.sleep(0.2)  # the others have sent what they send
            raise KeyError("boo")
        return tg.psum(x, "i")

    call = tg.pmap(f, "i", client=client)
    end_rank_programs(client)
    client.run(slow_to_hear, 0.5, workers=[sorted(client.nthreads())[slow]])
    try:
        with pytest.raises(tg.LayerError, match="rank 3 of f") as raised:
            call(torch.ones(4, 2))
        raised.value.__traceback__ = None
        assert wait_until(lambda: empty(client))
    finally:
        client.run(slow_to_hear, 0.0)


def break_socket(dask_worker) -> None:
    """End the connection to a driver, as a network may."""
    for host in program_hosts._hosts[dask_worker].named.values():
        if host._driver is not None:  # links between ranks have none
            host.channels._peers[host._driver].connection.shutdown(socket.SHUT_RDWR)


def test_a_socket_that_breaks(client):
    before_a_trainer(client)
    chain = tg.GraphChain(ConvNet(), client=client, placement=PLACEMENT)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, microbatches=2)
    [(x, y)] = images(1)
    trainer.step(x, y).item()
    worker = chain.placement[0].worker
    client.run(break_socket, workers=[worker])
    assert wait_until(lambda: not client.run(ways, workers=[worker])[worker])
    with pytest.raises(tg.WorkerLostError, match="worker 0"):
        trainer.step(x, y).item()
