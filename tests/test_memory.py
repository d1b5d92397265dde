"""What workers hold is visible; Dask's own moving and dropping of results does no harm."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from torch import nn

import taskgrad as tg
from conftest import wait_until
from helpers import assert_same


def test_memory_of_a_chain(client):
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Tanh(), nn.Linear(100, 10))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    weights = [40_000, 4_040]
    assert chain.memory().column("parameters") == weights
    assert chain.memory().column("tapes") == [0, 0]
    y = chain(torch.randn(50, 100))
    tg.collect(y)
    # Input, and what tanh gave (which both Linear's neighbours share): 50 x 100 floats each.
    first, second = chain.memory().column("tapes")
    assert 2 * 20_000 <= first <= 3 * 20_000
    assert 20_000 + 2_000 <= second <= 2 * 20_000 + 2_000
    tg.spawn(torch.sum, y).backward()
    assert chain.memory().column("tapes") == [0, 0]
    assert chain.memory().column("gradients") == weights
    optimizer = tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    optimizer.step()
    assert chain.memory().column("optimizer") == weights
    optimizer.zero_grad()
    assert chain.memory().column("gradients") == [0, 0]
    assert "parameters" in repr(chain.memory())


def test_memory_is_among_the_workers_metrics(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(100, 100, bias=False)), client=client)

    def reported():
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        return sum(w["metrics"].get("taskgrad_parameters", 0) for w in workers)

    assert wait_until(lambda: reported() == 40_000)
    del chain
    assert wait_until(lambda: reported() == 0)


LOOKING = """
import sys, threading, time, torch
from torch import nn
from taskgrad.graph.pytree import flatten
from taskgrad.worker.backward import Backward
from taskgrad.worker.sizes import total_bytes
from taskgrad.worker.store import Store, Tape

sys.setswitchinterval(1e-5)
store, net = Store("here", "."), nn.Sequential(*[nn.Linear(16, 16), nn.Tanh()] * 60)

def look():
    while True:
        total_bytes(store.entries())

threading.Thread(target=look, daemon=True).start()
for i in range(500):
    x = torch.randn(8, 16, requires_grad=True)
    leaves, structure = flatten(net(x).sum())
    store.put("f", Tape("t", [[x]], [flatten(x)[1]], leaves, structure, {}, None))
    time.sleep(0.001)  # somebody looks
    Backward("b", "f", "t", (None,), (0,), retain=False).run(store)
"""


def test_a_tape_can_be_looked_at_while_its_backward_runs():
    """As the metrics do, in the worker's event loop. Without the tape's lock: a segfault."""
    done = subprocess.run([sys.executable, "-c", LOOKING], timeout=200, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(scope="module")
def busy():
    """A cluster whose memory manager acts at once and which spills nearly everything."""
    settings = {
        "distributed.scheduler.active-memory-manager.interval": "50ms",
        "distributed.worker.memory.target": 1e-5,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.rebalance.recipient-max": 0.9,
        "distributed.worker.memory.rebalance.sender-min": 0.0,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=3, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def nothing(client, y):
    time.sleep(0.3)  # several rounds of the memory manager


def rebalance(client, y):
    client.rebalance()


def replicate(client, y):
    client.replicate([y._node.result], n=3)
    client.replicate([y._node.inputs[0].result], n=3)
    time.sleep(0.3)  # and the memory manager deletes copies again


def retire(client, y):
    idle = sorted(client.scheduler_info(n_workers=-1)["workers"])[2]
    client.retire_workers([w for w in [idle] if w not in busy_workers(y)], close_workers=False)


def busy_workers(y):
    return {y._node.worker, y._node.inputs[0].worker}


@pytest.mark.parametrize("disturb", [nothing, rebalance, replicate, retire])
def test_between_forward_and_backward(busy, disturb):
    """The memory manager on, spilling on: 1e-5 of 2 GiB is 21 kB, an activation is 256 kB."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    workers = sorted(busy.scheduler_info(n_workers=-1)["workers"])
    chain = tg.GraphChain(model, client=busy, placement=[workers[0], workers[0], workers[1]])
    x, t = torch.randn(256, 64, requires_grad=True), torch.randn(256, 64)
    y = chain(x)
    out = tg.collect(y)
    spilled = busy.run(lambda dask_worker: dask_worker.data.slow is not None)
    assert all(spilled.values())
    disturb(busy, y)
    tg.spawn(F.mse_loss, y, t).backward()
    ours, x.grad = x.grad, None
    F.mse_loss(model(x), t).backward()
    assert_same(ours, x.grad)
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)
    assert out is not None
