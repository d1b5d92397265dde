"""No tape is left anywhere, whatever happens to the driver or to a task."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from distributed import Client, wait
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same, future_of
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.worker import shard_ops, training
from taskgrad.worker.actions import OnShard
from taskgrad.worker.backward import Backward


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError("no")


def forward_and_backward(chain):
    tg.spawn(torch.sum, chain(torch.randn(64, 64))).backward()


def dropped(chain):
    tg.collect(chain(torch.randn(64, 64)))


def fails(chain):
    bad = tg.spawn(Fails(), chain(torch.randn(64, 64)))
    with pytest.raises(tg.LayerError):
        tg.collect(bad)


@pytest.mark.long
@pytest.mark.parametrize("what", [forward_and_backward, dropped, fails])
def test_300_rounds_leave_memory_flat(client, what):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), client=client)

    def memory():
        return sum(client.run(lambda: psutil.Process().memory_info().rss).values())

    for _ in range(60):  # until pools and logs of fixed size are full
        what(chain)
    chain.zero_grad()
    start = memory()
    for _ in range(300):
        what(chain)
    assert wait_until(lambda: total_held(client)["tapes"] == 0)
    assert wait_until(lambda: total_held(client)["gradients"] == 0)
    # One round's tapes and activations are 96 KiB: 300 of them left behind would be 28 MiB.
    assert memory() - start < 12 << 20


def test_an_exception_leaves_no_tape_even_while_its_thunk_is_held(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 3), Fails()), client=client, placement=[0, 1])
    y = chain(torch.randn(2, 3))
    with pytest.raises(tg.LayerError):
        tg.collect(y)
    assert wait_until(lambda: total_held(client)["tapes"] == 0)
    assert y is not None


def test_a_failing_backward_leaves_no_tape(client):
    class BadBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("in backward")

    chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 3)), client=client)
    y = tg.spawn(BadBackward.apply, chain(torch.randn(2, 3)), worker=1)
    with pytest.raises(tg.LayerError, match="backward of 'apply' on worker") as raised:
        tg.spawn(torch.sum, y).backward()
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


def test_cancelled_while_it_runs_leaves_no_tape(client, tmp_path):
    started, go_on = tmp_path / "started", tmp_path / "go on"

    def slow(x):
        started.touch()
        while not go_on.exists():
            time.sleep(0.01)
        return x * 2

    y = tg.spawn(slow, torch.ones(3, requires_grad=True)).persist()
    assert wait_until(started.exists, 30)
    del y
    assert wait_until(lambda: not any(client.processing().values()))
    go_on.touch()
    assert wait_until(lambda: not any(client.run(computing).values()))
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


def computing(dask_worker):
    return len(dask_worker.state.executing | dask_worker.state.long_running)


@pytest.mark.long
def test_a_long_wait_keeps_nothing_alive(client):
    """Without the garbage collector's help: no cycle through the frames that waited."""

    def slow(x):
        time.sleep(2.5)  # longer than a wait goes without a look at the workers
        return x * 2

    gc.collect()
    gc.disable()
    try:
        x = torch.ones(3, requires_grad=True)
        tg.spawn(torch.sum, tg.spawn(slow, x)).backward()
        tg.collect(tg.spawn(slow, x))
        end = time.monotonic() + 5
        while any(total_held(client).values()) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(total_held(client).values())
    finally:
        gc.enable()


def test_a_client_that_closes_leaves_nothing(client):
    with Client(client.scheduler.address) as own:
        chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 3)), client=own)
        y = chain(torch.randn(2, 3))
        tg.collect(y)
        _, back = tg.vjp(chain, torch.randn(2, 3))
        grads, _ = back(torch.ones(2, 3))
        tg.collect(grads)
        assert total_held(client) == {"shards": 1, "tapes": 1, "gradients": 1, "parts": 0}
    assert wait_until(lambda: not any(total_held(client).values()))
    assert chain is not None
    assert y is not None
    assert grads is not None


@pytest.mark.long
def test_a_driver_that_is_killed_while_it_trains_leaves_nothing(fresh):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)  # plugins are there
    del chain
    script = f"""
        from functools import partial
        import torch, taskgrad as tg
        from distributed import Client
        client = Client({client.scheduler.address!r})
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        chain = tg.GraphChain(model, client=client)
        optimizer = tg.Optimizer(chain, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        kept = []
        while True:
            kept.append(chain(torch.randn(8, 64)))
            tg.collect(kept[-1])
            tg.spawn(torch.sum, chain(torch.randn(8, 64))).backward()
            optimizer.step()
            print(len(kept), flush=True)
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    while int(driver.stdout.readline()) < 5:
        pass
    assert total_held(client)["shards"] == 2
    assert total_held(client)["tapes"] >= 8
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(60)
    driver.stdout.close()
    assert wait_until(lambda: not any(total_held(client).values()), 30), total_held(client)


def test_late_messages_of_an_old_run_are_refused(client):
    """Every entry stands under a key that no other run has: a late message names nothing."""
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.ones(2, 3, requires_grad=True)

    def run():
        chain = tg.GraphChain(model, client=client, placement=[0])
        y = chain(x)
        tg.collect(y)
        [stage] = chain.layout.shards
        return chain, y, stage.token, y._node.key

    *old, old_token, old_key = run()
    old.clear()
    assert wait_until(lambda: not any(total_held(client).values()))
    chain, y, token, key = run()
    assert {old_token, old_key}.isdisjoint({token, key})

    def late(dask_worker):
        store = store_of(dask_worker)
        dask_worker.stream_handlers["taskgrad-release"](keys=[old_token, old_key])
        refused = []
        backward = Backward(
            key="late", token=old_key, title="t", sources=(), wanted=(), retain=False
        )
        for action in (
            OnShard(token=old_token, function=shard_ops.zero_grad, arguments={}),
            OnShard(token=old_token, function=training.roll_back, arguments={"done": 0}),
            backward,
        ):
            try:
                action.run(store)
            except tg.TaskgradError as error:
                refused.append(type(error).__name__)
        store.put(old_key, "what a forward left that ended after its key was let go of")
        return refused, sorted(store.entries()) == sorted([token, key])

    address = chain.placement[0].worker
    assert client.run(late, workers=[address])[address] == (
        ["WorkerLostError", "WorkerLostError", "TapeError"],
        True,
    )
    y.backward(torch.ones(2, 3))
    assert_same(x.grad, torch.ones(2, 3) @ model[0].weight)


def lose(client, futures):
    """Move results to a third worker, as a rebalance would, and lose that: Dask runs them again."""
    keys = [f.key for f in futures]
    third = sorted(client.nthreads())[2]

    async def move(dask_scheduler):
        for key in keys:
            [holder] = dask_scheduler.tasks[key].who_has
            await dask_scheduler.gather_on_worker(third, {key: [holder.address]})
            await dask_scheduler.delete_worker_data(holder.address, [key], "test")
        await dask_scheduler.remove_worker(third, stimulus_id="test")

    client.run_on_scheduler(move)
    wait(futures, timeout=200)
    assert all(third not in w for w in client.who_has(futures).values())


def test_a_forward_that_dask_runs_again_gives_what_it_gave(fresh):
    """Other random numbers would not fit what was computed from the first ones."""
    client = fresh(n_workers=3)
    workers = sorted(client.nthreads())
    chain = tg.GraphChain(nn.Sequential(nn.Dropout()), client=client, placement=workers[:1])
    x = torch.ones(20, 100, requires_grad=True)
    y = chain(x)
    first = tg.collect(y).detach()
    lose(client, [future_of(y._node, client)])
    assert_same(tg.collect(y).detach(), first)
    y.backward(torch.ones(20, 100))
    assert_same(x.grad, first)  # 2 where a one was kept, 0 where it was dropped


@pytest.mark.long
def test_layers_that_dask_installs_again_stay_as_they_are(fresh):
    client = fresh(n_workers=3)
    workers = sorted(client.nthreads())
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client, placement=workers[:1])
    trained = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}
    chain.load_state_dict(trained)
    lose(client, [future_of(shard, client) for shard in chain.layout.shards])
    for name, value in chain.state_dict().items():
        assert_same(value, trained[name], name)
