"""Sharded tensors whose workers are lost, whose client is closed, or that come from another one."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from distributed import Client

import taskgrad as tg
from conftest import about_workers, keys_of, total_held, wait_for_another, wait_until
from helpers import long


def kill(client, worker: str) -> None:
    """Kill a worker's process, and wait until the scheduler knows."""
    pid = client.run(os.getpid, workers=[worker])[worker]
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: worker not in about_workers(client))


def made(client, size: int = 4) -> tg.ShardedTensor:
    """What ranks gave, which cannot be made again of what the driver has."""
    f = tg.pmap(lambda x: x + tg.psum(x, "i"), "i", gather=False, client=client)
    return f(torch.arange(float(size)))


@pytest.mark.parametrize("restarts", [True, *long(False)])
def test_a_lost_worker_is_an_error_on_use(fresh, restarts):
    client = fresh(n_workers=2)
    x, copies = made(client), made(client).reshard(None)
    for nanny in client.cluster.workers.values():
        nanny.auto_restart = restarts
    kill(client, x.parts[1].worker.address)
    if restarts:
        client.wait_for_workers(2)
    twice = tg.pmap(lambda x: x * 2, client=client)
    for use in (
        *(x.gather, x.sum, lambda: x + 1, lambda: x[3], lambda: twice(x)),
        *(lambda: x.reshard(None), lambda: copies + 1),
    ):
        with pytest.raises(tg.WorkerLostError, match=r"worker 1 \(tcp.*[Mm]ake the sharded tensor"):
            use()
    # What is on the other one is there.
    assert x[:2].gather().tolist() == [6, 7]
    assert copies.gather().tolist() == [6, 7, 8, 9]
    again = made(client)
    assert torch.equal(again.gather(), torch.arange(4.0) + 6)


def test_a_worker_with_parts_is_not_retired(fresh):
    client = fresh(n_workers=2)
    x = made(client)
    worker = x.parts[1].worker.address
    assert worker not in client.retire_workers([worker])
    assert torch.equal(x.gather(), torch.arange(4.0) + 6)
    del x
    assert wait_until(lambda: total_held(client)["parts"] == 0)
    # Its program waits a little for a next call.
    assert wait_until(lambda: worker in client.retire_workers([worker]))


@pytest.mark.long
def test_a_rank_that_dies_leaves_nothing(fresh):
    client = fresh(n_workers=2)

    def dies(x):
        if tg.axis_index("i") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return tg.psum(x, "i")

    before = set(client.nthreads())
    with pytest.raises(tg.WorkerLostError, match="rank 1"):
        tg.pmap(dies, "i", gather=False, client=client)(torch.ones(2))
    wait_for_another(client, before)
    assert wait_until(lambda: total_held(client)["parts"] == 0)


@pytest.mark.long
def test_a_worker_that_joins_gets_parts_of_what_is_made_then(fresh):
    client = fresh(n_workers=1)
    x = made(client, 5)
    client.cluster.scale(2)
    client.wait_for_workers(2)
    f = tg.pmap(lambda x: x * 2, gather=False, client=client)
    y = f(x)
    assert [part.worker.name for part in y.parts] == [0, 1]
    assert torch.equal(y.gather(), x.gather() * 2)
    assert torch.equal((y - x.reshard()).gather(), x.gather())


def test_a_closed_client(fresh):
    client = fresh(n_workers=1)
    x = made(client)
    shown = repr(x)
    client.close()
    assert repr(x) == shown
    for use in (x.gather, lambda: x + 1, lambda: x[0], x.sum, x.reshard, lambda: x.map(torch.sin)):
        with pytest.raises(tg.TaskgradError, match="client is closed"):
            use()
    with pytest.raises(tg.TaskgradError, match="client is closed"):
        tg.shard(torch.ones(2), client=client)


def test_two_clients(client, fresh):
    other = fresh(n_workers=1)
    x, y = made(client), made(other)
    with pytest.raises(tg.TaskgradError, match="two clients"):
        x + y
    with pytest.raises(tg.TaskgradError, match="of another client"):
        tg.pmap(torch.sin, client=client)(y)


def test_steps_and_operations_are_no_tasks(client):
    """Between workers nothing has to move, so programs do all of it."""
    before = keys_of(client, "")
    f = tg.pmap(lambda w: w - 0.5 * tg.psum(w, "i"), "i", gather=False, client=client)
    x = torch.arange(4.0).reshape(4, 1)
    w = f(x)
    for _ in range(3):
        w = f(w) * 2
        assert float(w.sum()) == float(w.gather().sum())
    new = keys_of(client, "") - before
    assert all(key.startswith("pmap-") for key in new)
    expected = x - 0.5 * x.sum(0)
    for _ in range(3):
        expected = (expected - 0.5 * expected.sum(0)) * 2
    assert torch.equal(w.gather(), expected)


def test_a_rank_that_fails_leaves_nothing_of_others_that_end_later(client):
    def f(x):
        if tg.axis_index("i") == 0:
            raise ArithmeticError("at once")
        time.sleep(1)
        return x

    with pytest.raises(tg.LayerError, match="rank 0"):
        tg.pmap(f, "i", gather=False, client=client)(torch.ones(2))
    time.sleep(1.5)
    assert wait_until(lambda: not any(total_held(client).values()))
    assert torch.equal(made(client).gather(), torch.arange(4.0) + 6)


def test_parts_of_a_client_that_is_gone_are_released(client):
    second = Client(client.scheduler.address, set_as_default=False)
    x = made(second)
    y = x + 1
    assert total_held(client)["parts"] == 4
    second.close()
    assert wait_until(lambda: total_held(client)["parts"] == 0)
    del x, y
