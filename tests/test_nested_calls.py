"""Tasks that wait for tasks: they give their thread back, or are refused; none waits for ever."""

from __future__ import annotations

import functools
import gc
import time

import dask
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until

SGD = functools.partial(torch.optim.SGD, lr=0.1)
TWO = torch.ones(2)


@pytest.fixture(scope="module")
def in_process():
    """Two workers of one thread in this process."""
    client = tg.local_cluster(n_workers=2, processes=False, dashboard_address=":0")
    yield client
    client.close()


@pytest.fixture(params=["processes", "threads"])
def workers(request, client):
    """Two workers of one thread, in processes of their own and in this one."""
    used = client if request.param == "processes" else request.getfixturevalue("in_process")
    with used.as_current():
        yield used


def ones(worker=None):
    """In a task: what another task gives."""
    return tg.collect(tg.spawn(torch.ones, 2, worker=worker))


def test_collect_in_a_call(workers):
    for here in (0, 1):
        for there in (0, 1, None):
            assert torch.equal(tg.collect(tg.spawn(ones, there, worker=here)), TWO)
    assert all(torch.equal(y, TWO) for y in tg.collect([tg.spawn(ones) for _ in range(6)]))


def fibonacci(n):
    return n if n < 2 else sum(tg.collect([tg.spawn(fibonacci, n - 1), tg.spawn(fibonacci, n - 2)]))


def test_calls_in_calls(client):
    assert tg.collect(tg.spawn(fibonacci, 5)) == 5


def test_collect_in_maps_and_ranks(workers):
    for over in ("processes", "both"):
        for seed in (None, 0):
            results = tg.map(lambda i: ones() * i, range(4), over=over, seed=seed)
            assert all(torch.equal(y, i * TWO) for i, y in enumerate(results))
    assert all(torch.equal(y, TWO) for y in tg.imap(lambda i: ones(), range(4)))
    y = tg.pmap(lambda x: tg.psum(x, "i") + ones() + tg.psum(x, "i"), "i")(torch.ones(2))
    assert torch.equal(y, torch.full((2, 2), 5.0))


def test_a_rank_draws_the_same_numbers_though_it_waits(client):
    def draws(x, waits):
        a = torch.rand(1)
        if waits:
            ones()
        return torch.cat([a, torch.rand(1)])

    found = []
    for waits in (False, True):
        torch.manual_seed(3)
        found.append(tg.pmap(draws, "i", in_axes=(0, None))(torch.ones(2), waits))
    assert torch.equal(*found)


def test_maps_in_maps(workers):
    expected = [[0, 0, 0], [0, 1, 2], [0, 2, 4], [0, 3, 6]]
    in_map = functools.partial(tg.map, lambda a, b: a * b)
    in_imap = lambda i: [*tg.imap(lambda j: i * j, range(3)), *tg.imap(abs, [])]  # noqa: E731
    assert tg.map(lambda i: in_map([i] * 3, range(3)), range(4)) == expected
    assert list(tg.imap(lambda i: in_map([i] * 3, range(3)), range(4))) == expected
    assert tg.map(in_imap, range(4)) == expected
    assert list(tg.imap(in_imap, range(4))) == expected


def trains():
    """In a task: a chain, its backward, and a trainer of its own."""
    with torch.enable_grad():
        torch.manual_seed(0)
        chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), placement=[0, 1])
        x = torch.ones(4, 2, requires_grad=True)
        tg.collect(chain(x)).sum().backward()
        chain(x).backward(torch.ones(4, 1))
        chain.zero_grad()
        trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)
        losses = [trainer.step(torch.ones(4, 2), torch.zeros(4, 1)).item() for _ in range(3)]
        return x.grad, losses


def test_a_chain_and_a_trainer_in_a_call(client):
    expected = trains()
    for grad, losses in tg.collect([tg.spawn(trains, worker=w) for w in (0, 1, 0)]):
        assert torch.equal(grad, expected[0])
        assert losses == expected[1]
    client.run(gc.collect)
    assert wait_until(lambda: not any(total_held(client).values()))


def test_collect_in_plain_dask_tasks(client):
    ran = client.gather(client.map(lambda i: ones(), range(4), pure=False))
    assert all(torch.equal(y, TWO) for y in ran)
    assert torch.equal(dask.delayed(ones)().compute(), TWO)


class DaskInside(nn.Module):
    def forward(self, x):
        return x + dask.delayed(lambda: time.sleep(0.05) or 1)().compute()


def test_dask_in_a_layer_that_others_wait_for(client):
    """Other calls of the stage wait for it, and give their threads back as well."""
    chain = tg.GraphChain(nn.Sequential(nn.Identity(), DaskInside()), placement=[0, 1])
    assert all(torch.equal(y, 2 * TWO) for y in tg.collect([chain(TWO) for _ in range(4)]))


class Inside(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


WAITS = {
    "collect": lambda x: x + ones(),
    "imap": lambda x: sum(tg.imap(lambda i: x * i, [1, 2])),
    "chain": lambda x: tg.GraphChain(nn.Sequential(nn.Identity())),
    "collect in a map": lambda x: sum(tg.map(lambda i: x * ones(), [1, 2])),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_layer_that_waits_for_tasks_is_refused(workers, name):
    model = nn.Sequential(nn.Identity(), Inside(WAITS[name]))
    chain = tg.GraphChain(model, placement=[0, 1])
    with pytest.raises(tg.LayerError, match="waits for tasks.*tg.map.*collect before") as raised:
        tg.collect(chain(TWO))
    assert type(raised.value.__cause__) is tg.TaskgradError
    del chain, raised
    assert wait_until(lambda: not any(total_held(workers).values()))
    mapped = tg.GraphChain(nn.Sequential(Inside(lambda x: sum(tg.map(lambda i: x * i, [1, 2])))))
    assert torch.equal(tg.collect(mapped(TWO)), 3 * TWO)


def test_a_loss_that_waits_for_tasks_is_refused(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), placement=[0, 1])
    trainer = tg.Trainer(chain, lambda y, t: ((y - ones()) ** 2).mean(), SGD)
    with pytest.raises(tg.LayerError, match="layer 'loss'.*waits for tasks"):
        trainer.step(torch.ones(4, 2), torch.ones(4, 2)).item()


def test_a_thread_of_a_map_in_a_task_that_waits_is_refused(fresh):
    client = fresh(n_workers=1, threads_per_worker=2)
    with client.as_current(), pytest.raises(tg.TaskgradError, match="a thread of a map in a task"):
        tg.map(lambda i: ones(), range(4), over="both")
