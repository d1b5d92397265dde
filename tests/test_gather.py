"""Results for the driver: from a worker of its own host from memory to memory, or by the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster

import taskgrad as tg
from leasing import needs_others, refuse_reads, without_handler
from taskgrad.cluster import internals
from taskgrad.cluster.session import session
from taskgrad.cluster.wire import message_leases, peers, process_memory
from taskgrad.cluster.wire.gather import gather_values

COUNT = 500_000  # floats: 2 MB


@pytest.fixture
def ours(client) -> tuple[Client, list[str]]:
    """A client that has not asked its workers yet, and they."""
    peers._registries.pop(client, None)
    return client, [worker.address for worker in session(client).workers()]


def make(client: Client, worker: str, fn: Any = torch.arange, *args: Any) -> Any:
    """The future of a value that a worker has made."""
    future = client.submit(fn, *(args or (COUNT,)), workers=[worker], pure=False)
    future.exception(timeout=200)
    return future


def fetch(client: Client, futures: list[Any], workers: list[str]) -> list[Any]:
    pending = gather_values(client, futures, workers)
    assert pending.done(30)
    return pending.result()


@needs_others
def test_results_are_read_from_the_workers_memory(ours):
    client, workers = ours
    futures = [make(client, w, torch.full, (COUNT,), float(i)) for i, w in enumerate(workers)]
    before = message_leases.bytes_read()
    found = fetch(client, futures, workers)
    assert message_leases.bytes_read() - before == 2 * COUNT * 4
    del futures  # what the workers do with their memory from now on
    refill = [make(client, w, torch.full, (COUNT,), -1.0) for w in workers]
    assert [t.unique().tolist() for t in found] == [[0], [1]]
    del refill


@needs_others
def test_a_driver_asks_each_worker_once_whether_it_lends(ours, monkeypatch):
    client, workers = ours
    asked = []
    stock = peers.probe

    async def probe(client, worker, seconds):
        asked.append(worker)
        await stock(client, worker, seconds)

    monkeypatch.setattr(peers, "probe", probe)
    for _ in range(2):
        fetch(client, [make(client, w) for w in workers], workers)
    assert sorted(asked) == sorted(workers)


@needs_others
def test_what_cannot_be_read_comes_by_the_wire(ours, monkeypatch):
    client, (a, _) = ours
    assert torch.equal(fetch(client, [make(client, a)], [a])[0], torch.arange(COUNT))
    before = message_leases.bytes_read()
    monkeypatch.setattr(process_memory, "read", process_memory.read)  # sets it back
    refuse_reads()
    for _ in range(peers.ATTEMPTS + 1):
        assert torch.equal(fetch(client, [make(client, a)], [a])[0], torch.arange(COUNT))
    assert message_leases.bytes_read() == before


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """Workers that are asked for results themselves; none gives any."""
    found: list[Any] = []

    async def results_of(client, worker, keys, *, seconds):
        found.append(worker)
        return {}

    monkeypatch.setattr(internals, "results_of", results_of)
    return found


def test_a_worker_that_does_not_lend_is_not_asked_for_results(ours, asked):
    client, (a, _) = ours
    with without_handler(client, a, peers.PROBE):
        assert torch.equal(fetch(client, [make(client, a)], [a])[0], torch.arange(COUNT))
    assert not asked


def test_nor_is_one_on_another_host(ours, asked, monkeypatch):
    client, (a, _) = ours
    with monkeypatch.context() as context:
        context.setattr(internals, "host_of", lambda client: "192.0.2.7")
        assert torch.equal(fetch(client, [make(client, a)], [a])[0], torch.arange(COUNT))
    assert not asked


@needs_others
def test_one_that_lends_is_asked_and_what_it_does_not_give_comes_all_the_same(ours, asked):
    client, (a, _) = ours
    assert torch.equal(fetch(client, [make(client, a)], [a])[0], torch.arange(COUNT))
    assert asked == [a]


def test_what_is_not_where_it_ran_is_found(ours):
    client, (a, b) = ours
    there = make(client, a)
    assert torch.equal(fetch(client, [there], [b])[0], torch.arange(COUNT))
    assert torch.equal(fetch(client, [there], [""])[0], torch.arange(COUNT))
    values = fetch(client, [there, make(client, b, int, 3), there], [b, b, a])
    assert (values[1], values[0].shape, values[2].shape) == (3, (COUNT,), (COUNT,))


def test_what_a_worker_raised_is_raised(ours):
    client, (a, b) = ours
    futures = [make(client, a), make(client, b, int, "x")]
    pending = gather_values(client, futures, [a, b])
    assert pending.done(30)
    with pytest.raises(ValueError, match="invalid literal"):
        pending.result()


@needs_others
def test_what_is_collected_comes_so(ours):
    client, _ = ours
    net = torch.nn.Sequential(torch.nn.Linear(8, COUNT // 8, bias=False))
    chain = tg.GraphChain(net, placement=[0], client=client)
    x, before = torch.randn(8, 8), message_leases.bytes_read()
    assert torch.equal(tg.collect(chain(x)), net(x))
    between = message_leases.bytes_read()
    assert between - before == COUNT * 4
    assert torch.equal(chain.to_module()[0].weight, net[0].weight)
    assert message_leases.bytes_read() - between == COUNT * 4


@needs_others
def test_a_worker_that_has_gone_is_not_tried_for_long():
    """Not the 30 s for which Dask tries to connect."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        a, b = [worker.address for worker in session(client).workers()]
        fetch(client, [make(client, a)], [a])
        there = make(client, b)
        nanny = next(n for n in cluster.workers.values() if n.worker_address == a)
        client.sync(nanny.close)
        pending = gather_values(client, [there], [a])
        assert pending.done(20)
        assert torch.equal(pending.result()[0], torch.arange(COUNT))


def test_within_a_process_a_value_is_passed_as_it_is():
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        (worker,) = session(client).workers()
        there = make(client, worker.address)
        (found,) = fetch(client, [there], [worker.address])
        assert torch.equal(found, torch.arange(COUNT))
        look = lambda key, dask_worker: dask_worker.data[key].data_ptr()  # noqa: E731
        held = client.run(look, there.key)
        assert held[worker.address] == found.data_ptr()
