"""Inputs of the driver: to a worker of its own host from memory to memory, or else by the wire."""

from __future__ import annotations

import uuid

import pytest
import torch
from distributed import Client, LocalCluster

import taskgrad as tg
from conftest import wait_until
from leasing import allow_reads, needs_others, refuse_reads, without_handler
from taskgrad.cluster.session import session
from taskgrad.cluster.wire import message_leases, peers, scatter

COUNT = 500_000  # floats: 2 MB


@pytest.fixture
def ours(client) -> tuple[Client, list[str]]:
    """A client whose workers have not been asked yet, and they."""
    peers._registries.pop(client, None)
    return client, [worker.address for worker in session(client).workers()]


def send(client: Client, worker: str, value):
    """The value as it is on the worker."""
    key = f"input-{uuid.uuid4().hex}"
    return scatter.send(client, [({key: value}, [worker])])[key]


def borrowed(client: Client, worker: str) -> int:
    return client.run(message_leases.bytes_read, workers=[worker])[worker]


@needs_others
def test_a_value_is_read_from_the_drivers_memory_and_is_the_workers_own(ours):
    client, (a, b) = ours
    before = borrowed(client, a), borrowed(client, b)
    value = [b"some bytes", torch.arange(COUNT), {"x": (torch.ones(COUNT), None)}, 3]
    there = send(client, a, value)
    value[1].zero_()  # what the driver does with its tensors afterwards is its own business
    first, second, third, fourth = there.result()
    assert (first, fourth) == (b"some bytes", 3)
    assert torch.equal(second, torch.arange(COUNT))
    assert torch.equal(third["x"][0], torch.ones(COUNT))
    assert third["x"][1] is None
    assert borrowed(client, a) - before[0] == COUNT * (8 + 4)
    assert borrowed(client, b) == before[1]


def _held_keys(client):
    return {key for held in client.has_what().values() for key in held}


@needs_others
def test_what_several_workers_take_each_of_them_reads_itself(ours):
    client, workers = ours
    before = [borrowed(client, w) for w in workers]
    shared, own = torch.arange(COUNT), torch.ones(COUNT)
    keys = [f"input-{uuid.uuid4().hex}" for _ in range(2)]
    there = scatter.send(client, [({keys[0]: shared}, workers), ({keys[1]: own}, workers[:1])])
    assert [borrowed(client, w) - b for w, b in zip(workers, before, strict=True)] == [
        COUNT * (8 + 4),
        COUNT * 8,
    ]
    held = client.who_has(list(there.values()))
    assert {key: {*at} for key, at in held.items()} == {keys[0]: {*workers}, keys[1]: {workers[0]}}
    assert torch.equal(there[keys[0]].result(), shared)
    doubled = client.submit(lambda x, y: (x + y)[-1], *there.values(), workers=workers[:1])
    assert doubled.result() == COUNT
    keys.append(doubled.key)
    del there, doubled
    assert wait_until(lambda: not set(keys).intersection(_held_keys(client)))


@needs_others
def test_where_one_of_several_cannot_read_it_they_pass_it_on(ours):
    client, workers = ours
    before = [borrowed(client, w) for w in workers]
    key = f"input-{uuid.uuid4().hex}"
    client.run(refuse_reads, workers=workers[1:])
    try:
        there = scatter.send(client, [({key: torch.arange(COUNT)}, workers)])
    finally:
        client.run(allow_reads, workers=workers[1:])
    assert sorted(client.who_has([there[key]])[key]) == sorted(workers)
    assert torch.equal(there[key].result(), torch.arange(COUNT))
    assert borrowed(client, workers[1]) == before[1]


@needs_others
def test_many_tensors_that_are_small_by_themselves(ours):
    client, (a, _) = ours
    before = borrowed(client, a)
    value = [torch.full((5_000,), float(i)) for i in range(40)]
    there = send(client, a, value)
    assert all(map(torch.equal, there.result(), value))
    assert borrowed(client, a) - before == 40 * 5_000 * 4


@needs_others
@pytest.mark.parametrize("can", [True, False])
def test_a_worker_is_asked_once_whether_it_can(ours, can):
    client, (a, _) = ours

    def count(dask_worker) -> None:
        dask_worker.asked = 0
        dask_worker.stock = dask_worker.handlers[peers.PROBE]

        def probe(peer, token, table):
            dask_worker.asked += 1
            able, its_token = dask_worker.stock(peer, token, table)
            return can and able, its_token

        dask_worker.handlers[peers.PROBE] = probe

    def restore(dask_worker) -> int:
        dask_worker.handlers[peers.PROBE] = dask_worker.stock
        return dask_worker.asked

    client.run(count, workers=[a])
    before = borrowed(client, a)
    there = [send(client, a, torch.full((COUNT,), float(i))) for i in range(3)]
    assert client.run(restore, workers=[a])[a] == 1
    assert borrowed(client, a) - before == (3 * COUNT * 4 if can else 0)
    assert [future.result()[0].item() for future in there] == [0, 1, 2]


@needs_others
def test_a_read_that_fails_is_a_transfer_by_the_wire(ours):
    client, (a, _) = ours
    before = borrowed(client, a)
    client.run(refuse_reads, workers=[a])
    try:
        for i in range(peers.ATTEMPTS + 2):
            there = send(client, a, torch.full((COUNT,), float(i)))
            assert there.result()[0] == i
        assert peers._registries[client].readers == set()  # it was asked again, but not for ever
    finally:
        client.run(allow_reads, workers=[a])
    assert borrowed(client, a) == before


def test_a_worker_that_does_not_borrow_gets_it_by_the_wire(ours):
    client, (a, _) = ours
    before = borrowed(client, a)
    with without_handler(client, a, peers.PROBE):
        there = send(client, a, [torch.ones(COUNT)])
        assert torch.equal(there.result()[0], torch.ones(COUNT))
    assert borrowed(client, a) == before


@needs_others
def test_the_batch_of_a_chain_goes_so(ours):
    client, (a, _) = ours
    before = borrowed(client, a)
    chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Identity()), placement=[0], client=client)
    x = torch.randn(COUNT)
    assert torch.equal(tg.collect(chain(x)), x)
    assert borrowed(client, a) - before == COUNT * 4


def test_within_a_process_a_value_is_passed_as_it_is():
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        (worker,) = session(client).workers()
        assert worker.address.startswith("inproc:")
        there = send(client, worker.address, [torch.ones(COUNT)])
        assert torch.equal(there.result()[0], torch.ones(COUNT))
        del there
        assert wait_until(
            lambda: not client.run(lambda dask_worker: len(dask_worker.data))[worker.address]
        )
