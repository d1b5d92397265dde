"""A worker that holds layers, tapes or gradients is not retired; one that holds none is."""

from __future__ import annotations

import time

import pytest
import torch
from distributed import Client
from torch import nn

import taskgrad as tg
from conftest import about_workers, total_held, wait_until
from helpers import assert_same, assert_vjp_equals_torch, reference
from taskgrad.cluster.retirement import TOPIC


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def addresses(client):
    return {a for a, w in about_workers(client).items() if w["status"] == "running"}


def told(client):
    """What the scheduler told of workers that were not retired, as each had said what it holds."""
    return [event for _, event in client.get_events(TOPIC)]


def test_a_worker_that_holds_layers_stays_and_the_chain_goes_on(fresh):
    client = fresh(n_workers=3)
    network, x = model(), torch.randn(5, 8)
    chain = tg.GraphChain(network, client=client, placement=[0, 0, 1])
    first, second = dict.fromkeys(chain.placement.column("worker"))
    idle = (addresses(client) - {first, second}).pop()
    out, grads, _ = reference(network, x)
    y, back = tg.vjp(chain, x)  # tapes from before
    assert_same(tg.collect(y).detach(), out)
    assert client.retire_workers([first]) == {}
    assert client.retire_workers(names=[1]) == {}
    assert list(client.retire_workers([first, idle, "tcp://127.0.0.1:1"])) == [idle]
    assert addresses(client) == {first, second}
    ours, _ = tg.collect(back(torch.ones_like(out)))
    for name, grad in grads.items():
        assert_same(ours[name], grad, name)
    assert_vjp_equals_torch(chain, network, x)

    assert wait_until(lambda: len(told(client)) == 3)
    event = {"action": "taskgrad-not-retired", "shards": 1, "tapes": 1, "gradients": 0, "parts": 0}
    assert sorted(e["worker"] for e in told(client)) == sorted([first, first, second])
    assert all(e == {**event, "worker": e["worker"]} for e in told(client))
    logs = [line for _, line in client.get_scheduler_logs()]
    assert any(f"worker 0 ({first}) is not retired" in line for line in logs), logs

    del y, back, ours
    del chain
    assert wait_until(lambda: list(client.retire_workers([first])) == [first])
    assert addresses(client) == {second}


def test_a_worker_that_holds_only_a_tape_stays_until_it_is_used(fresh):
    client = fresh(n_workers=2)
    x = torch.ones(3, requires_grad=True)
    y = tg.spawn(torch.sin, x, worker=1)
    tg.collect(y)
    worker = y._node.worker
    assert client.retire_workers([worker]) == {}
    assert wait_until(lambda: told(client)[-1:] and told(client)[-1]["tapes"] == 1)
    y.backward(torch.ones(3))
    assert_same(x.grad, torch.cos(torch.ones(3)))
    # The thunk, and so its key, is still held; its tape is not.
    assert wait_until(lambda: list(client.retire_workers([worker])) == [worker])
    assert_same(tg.collect(y).detach(), torch.sin(torch.ones(3)))


def test_gradients_of_a_function_are_results_and_are_moved(fresh):
    client = fresh(n_workers=2)
    layer = nn.Linear(2, 2)
    y, back = tg.vjp(lambda x: tg.spawn(layer, x, worker=1), torch.ones(1, 2))
    grads, _ = back(torch.ones(1, 2))
    expected = tg.collect(grads)
    del y, back
    worker = next(iter(grads.values()))._node.worker
    assert wait_until(lambda: total_held(client)["tapes"] == 0)
    assert wait_until(lambda: list(client.retire_workers([worker])) == [worker])
    for name, grad in tg.collect(grads).items():
        assert_same(grad, expected[name])


def test_a_worker_that_is_running_our_task_stays(fresh):
    client = fresh(n_workers=2)
    y = tg.spawn(lambda x: time.sleep(2) or x * 2, torch.ones(3), worker=1).persist()
    worker = y._node.worker
    assert wait_until(lambda: client.processing()[worker])
    assert client.retire_workers([worker]) == {}
    assert_same(tg.collect(y), 2 * torch.ones(3))


def test_results_are_moved_off_as_ever(fresh):
    client = fresh(n_workers=2)
    y = tg.spawn(torch.sin, torch.ones(3), worker=1)
    tg.collect(y)
    worker = y._node.worker
    assert list(client.retire_workers([worker])) == [worker]
    assert_same(tg.collect(y), torch.sin(torch.ones(3)))
    assert told(client) == []


def test_dask_chooses_among_those_that_hold_nothing(fresh):
    client = fresh(n_workers=3)
    chain = tg.GraphChain(model(), client=client, placement=[0, 0, 1])
    holding = set(chain.placement.column("worker"))
    [idle] = addresses(client) - holding

    async def choose(dask_scheduler):
        # What Dask's HTTP API does, and the Kubernetes operator through it.
        chosen = dask_scheduler.workers_to_close(n=3)
        return chosen, list(await dask_scheduler.retire_workers(workers=sorted(holding)))

    assert client.run_on_scheduler(choose) == ([idle], [])
    assert list(client.retire_workers(n=3)) == [idle]
    assert addresses(client) == holding


def test_after_the_last_client_dask_retires_as_ever(fresh):
    owner = fresh(n_workers=2)
    with Client(owner.scheduler.address) as client:
        chain = tg.GraphChain(model(), client=client, placement=[0, 0, 1])
        worker = chain.placement[0].worker
        assert owner.retire_workers([worker]) == {}
    assert wait_until(lambda: list(owner.retire_workers([worker])) == [worker])


async def close_gracefully(dask_worker):
    await dask_worker.close_gracefully(reason="test")


def test_a_worker_that_wants_to_leave_stays_open_until_it_holds_nothing(fresh):
    client = fresh(n_workers=2)
    network, x = model(), torch.randn(5, 8)
    chain = tg.GraphChain(network, client=client, placement=[0, 0, 1])
    worker, other = dict.fromkeys(chain.placement.column("worker"))
    with pytest.raises(tg.TaskgradError, match=rf"{worker}\) holds layers or tapes.*then closes"):
        client.run(close_gracefully, workers=[worker])
    assert addresses(client) == {worker, other}
    assert_vjp_equals_torch(chain, network, x)  # it takes tasks
    assert tg.collect(tg.spawn(torch.sin, x, worker=0)) is not None
    del chain
    assert wait_until(lambda: addresses(client) == {other}, 30)


def end_lifetime(dask_worker):
    """What a worker does when it was started with a lifetime and that is over."""
    dask_worker.loop.call_later(0, dask_worker.close_gracefully, reason="worker-lifetime-reached")


@pytest.mark.long
def test_a_worker_whose_lifetime_is_over(fresh):
    client = fresh(n_workers=2)
    network, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
    chain = tg.GraphChain(network, client=client, placement=[1])
    worker = chain.placement[0].worker
    client.run(end_lifetime)
    assert wait_until(lambda: addresses(client) == {worker}, 30)
    assert wait_until(lambda: told(client))
    assert_vjp_equals_torch(chain, network, x)
    del chain
    assert wait_until(lambda: not addresses(client), 30)


@pytest.mark.long
def test_an_adaptive_cluster_shrinks_once_the_chain_is_gone(fresh):
    client = fresh(n_workers=2)
    network, x = model(), torch.randn(5, 8)
    chain = tg.GraphChain(network, client=client, placement=[0, 0, 1])
    before = addresses(client)
    client.cluster.adapt(minimum=1, maximum=2, interval="50ms", wait_count=2)
    time.sleep(2)  # 40 looks at whom it could close
    assert addresses(client) == before
    assert_vjp_equals_torch(chain, network, x)
    assert wait_until(lambda: len(told(client)) == 2)
    assert {event["worker"] for event in told(client)} == before  # once each
    del chain
    assert wait_until(lambda: len(addresses(client)) == 1, 30)
    time.sleep(0.3)
    assert len(told(client)) == 2
