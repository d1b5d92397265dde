"""What workers hold is visible; Dask's own moving and dropping of results does no harm."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from torch import nn

import taskgrad as tg
from conftest import about_workers, wait_until
from helpers import assert_same, future_of, long
from taskgrad.graph.pytree import flatten
from taskgrad.worker.backward import Backward
from taskgrad.worker.memory import storages, total_bytes
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.shard_lock import exclusive
from taskgrad.worker.store import Store
from taskgrad.worker.tape import Tape
from taskgrad.worker_names import WorkerName


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_memory_of_a_sparse_tensor_is_that_of_all_its_parts(layout):
    parts = torch.arange(5), torch.arange(4), torch.ones(4)
    t = torch.sparse_compressed_tensor(*parts, layout=layout)
    assert sum(storages([t]).values()) == 5 * 8 + 4 * 8 + 4 * 4


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
    """The columns of the dashboard's table of workers: the same sums as the chain's own."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.BatchNorm1d(100))
    chain = tg.GraphChain(model, client=client, placement=[0, 1])
    optimizer = tg.Optimizer(chain, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    names = chain.memory().column("worker")

    def reported(what):
        workers = about_workers(client)
        return [workers[name]["metrics"][f"taskgrad_{what}"] for name in names]

    tg.spawn(torch.sum, chain(torch.randn(50, 100))).backward()
    optimizer.step()
    y = chain(torch.randn(50, 100))
    tg.collect(y)
    for what in ("parameters", "buffers", "gradients", "optimizer", "tapes"):
        held = chain.memory().column(what)
        assert any(held), what
        assert wait_until(lambda what=what, held=held: reported(what) == held), what
    del y, chain, optimizer
    for what in ("parameters", "buffers", "gradients", "optimizer", "tapes"):
        assert wait_until(lambda what=what: reported(what) == [0, 0]), what


def until_there(_, path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_metrics_move_while_a_worker_is_always_at_work(fresh, tmp_path):
    client = fresh(n_workers=1, threads_per_worker=2)
    at_work = tg.spawn(until_there, torch.zeros(1), tmp_path / "end").persist()
    chain = tg.GraphChain(nn.Linear(100, 100), client=client)
    y = chain(torch.randn(50, 100))
    tg.collect(y)

    def reported():
        [worker] = about_workers(client).values()
        return [worker["metrics"].get(f"taskgrad_{what}") for what in ("parameters", "tapes")]

    (tape,) = chain.memory().column("tapes")
    assert wait_until(lambda: reported() == [40_400, tape])
    (tmp_path / "end").touch()
    tg.collect(at_work)


class Look(torch.autograd.Function):
    """Its backward calls a function, as somebody might who looks from another thread."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.look()
        return grad, None


@pytest.mark.parametrize("retain", [False, True])
def test_nobody_looks_at_a_tape_while_its_backward_runs(retain):
    """Autograd frees it meanwhile, without Python's lock: who looks takes the worker down."""
    store, seen = Store(WorkerName("here"), "."), []
    x = torch.randn(8, 16, requires_grad=True)
    leaves, structure = flatten(
        Look.apply(x.tanh(), lambda: seen.append(total_bytes(before))).sum()
    )
    store.put("f", Tape("t", [[x]], [flatten(x)[1]], leaves, structure, {}, None))
    before = store.entries()  # what a heartbeat in another thread has found
    for _ in range(1 + retain):
        Backward("b", "f", "t", (None,), (0,), retain=retain).run(store)
    assert [held["tapes"] for held in seen] == [0] * (1 + retain)
    assert total_bytes(before)["tapes"] >= 8 * 16 * 4  # afterwards one may


@pytest.fixture(scope="module")
def busy():
    """A cluster whose memory manager acts at once, and that moves results about when asked."""
    settings = {
        "distributed.scheduler.active-memory-manager.interval": "50ms",
        "distributed.worker.memory.rebalance.measure": "managed",
        "distributed.worker.memory.rebalance.recipient-max": 0.9,
        "distributed.worker.memory.rebalance.sender-min": 0.0,
        "distributed.worker.memory.rebalance.sender-recipient-gap": 0.0,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=3, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


# Each disturbs results after some forwards and sees that it did: `results` are the futures of their
# tasks, on the first and the second of the three workers.


def copies(client, results):
    return {len(workers) for workers in client.who_has(results).values()}


def rebalance(client, results, workers):
    assert wait_until(lambda: copies(client, results) == {1})  # others cannot be moved
    client.amm.stop()  # it may take the new copy for the one too many
    try:
        client.rebalance(results)
    finally:
        client.amm.start()
    assert any(workers[2] in w for w in client.who_has(results).values())


def replicate(client, results, workers):
    client.amm.stop()
    try:
        client.replicate(results, n=3)
        assert copies(client, results) == {3}
    finally:
        client.amm.start()


def memory_manager(client, results, workers):
    replicate(client, results, workers)
    assert wait_until(lambda: copies(client, results) == {1})


def retire_workers(client, results, workers):
    """What `client` retires is gone for good, so this comes last."""
    rebalance(client, results, workers)
    assert list(client.retire_workers(workers)) == [workers[2]]
    assert all(w and workers[2] not in w for w in client.who_has(results).values())


@pytest.mark.parametrize("disturb", [memory_manager, *long(rebalance, replicate, retire_workers)])
def test_between_forward_and_backward(busy, disturb):
    forward_disturb_backward(busy, disturb)


def test_spilling(fresh):
    """Whatever is larger than 1e-5 of 2 GiB, 21 kB, goes to the disk."""
    settings = {"target": 1e-5, "spill": False, "pause": False}

    def look(client, results, workers):
        on_disk = set().union(*client.run(lambda dask_worker: set(dask_worker.data.slow)).values())
        assert on_disk >= {f.key for f in results}

    with dask.config.set({f"distributed.worker.memory.{k}": v for k, v in settings.items()}):
        client = fresh(n_workers=2, memory_limit="2GiB")
    forward_disturb_backward(client, look)


def forward_disturb_backward(client, disturb):
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    workers = sorted(client.nthreads())
    chain = tg.GraphChain(model, client=client, placement=[workers[0], workers[0], workers[1]])
    xs = [torch.randn(256, 64, requires_grad=True) for _ in range(6)]
    ys = [chain(x) for x in xs]
    out = [y.detach() for y in tg.collect(ys)]
    nodes = [n for y in ys for n in (y._node.inputs[0], y._node)]
    disturb(client, [future_of(n, client) for n in nodes], workers)
    for x, y, before in zip(xs, ys, out, strict=True):
        tg.spawn(F.mse_loss, y, torch.zeros(256, 64)).backward()
        ours, x.grad = x.grad, None
        theirs = model(x)
        F.mse_loss(theirs, torch.zeros(256, 64)).backward()
        assert_same(ours, x.grad)
        assert_same(before, theirs.detach())
        assert_same(tg.collect(y).detach(), before)
    for name, grad in tg.collect(chain.grads()).items():
        assert_same(grad, model.get_parameter(name).grad, name)


def test_nobody_reads_gradients_while_a_task_has_the_stage():
    """torch crashes where one thread reads ``.grad`` and another replaces it: the task counts."""
    parameter = nn.Parameter(torch.zeros(100))
    stage = ResidentShard({}, {"p": parameter}, torch.device("cpu"))
    made, asked = threading.Event(), threading.Event()

    def task():
        with exclusive(stage):
            parameter.grad = torch.ones(100)
            made.set()
            asked.wait(30)

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(task)
        assert made.wait(30)
        assert total_bytes({"s": stage})["gradients"] == 0
        asked.set()
        running.result()
        with stage.lock:  # so that the other thread can only say what the task has counted
            assert pool.submit(total_bytes, {"s": stage}).result()["gradients"] == 400
