"""Large tensors between two workers of one host go from memory to memory, or else by the wire."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import dask
import distributed.worker
import pytest
import torch
from distributed import Client, LocalCluster, Worker
from distributed.comm import utils as comm_utils
from distributed.utils import open_port

from conftest import about_workers, wait_until
from leasing import (
    COUNT,
    acquaint,
    allow_reads,
    borrowed,
    equal,
    make,
    make_strided,
    needs_call,
    needs_others,
    pass_one,
    readers,
    refuse_reads,
    use,
)
from taskgrad.cluster.closing import hang_up
from taskgrad.cluster.wire import peers, result_table


def same(t: torch.Tensor) -> torch.Tensor:
    return t


def forget(dask_worker: Worker) -> None:
    """What this worker knows of others, and what a test did to it."""
    peers._registries[dask_worker].readers.clear()
    peers._registries[dask_worker].readers.attempts.clear()
    allow_reads()


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Client, list[str]]]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield use(client)


@pytest.fixture
def strangers(two) -> tuple[Client, list[str]]:
    """Two worker processes that have not had to do with each other."""
    client, _ = two
    client.run(forget)
    return two


@pytest.fixture
def pair(strangers) -> tuple[Client, list[str]]:
    """Two that have."""
    client, (a, b) = strangers
    acquaint(client, a, b)
    acquaint(client, b, a)
    return strangers


@needs_others
@pytest.mark.parametrize("maker", [make, make_strided])
def test_32_mb_pass_from_memory_to_memory(pair, maker):
    client, (a, b) = pair
    before = borrowed(client)
    for seed in range(3):
        assert pass_one(client, a, b, seed, maker)
        assert pass_one(client, b, a, seed, maker)
    after = borrowed(client)
    assert {w: after[w] - before[w] for w in after} == {a: 3 * 4 * COUNT, b: 3 * 4 * COUNT}


def count_threads(dask_worker: Worker) -> list[str]:
    """From now on, what messages a worker makes in a thread beside its event loop."""
    made: list[str] = []
    stock = getattr(comm_utils.offload, "stock", comm_utils.offload)

    async def offload(fn, *args, **kwargs):
        made.append(fn.__qualname__)
        return await stock(fn, *args, **kwargs)

    offload.stock = stock
    comm_utils.offload = offload
    dask_worker.made_in_threads = made
    return made


@needs_others
def test_only_messages_that_are_work_are_made_in_a_thread(strangers):
    """One that is lent as it lies is not; one that is sent, or has to be packed first, is."""
    client, (a, b) = strangers
    client.run(count_threads)
    made = lambda: client.run(lambda dask_worker: len(dask_worker.made_in_threads))[a]  # noqa: E731
    acquaint(client, a, b)  # sent: Dask may have been told to compress it
    assert made() == 1
    assert pass_one(client, a, b, 1)
    assert made() == 1
    assert pass_one(client, a, b, 1, make_strided)
    assert made() == 2


@needs_others
def test_the_sender_may_let_go_at_once(pair):
    client, (a, b) = pair
    before = borrowed(client)[b]
    kept = []
    for seed in range(5):
        there = client.submit(make, seed, workers=[a], pure=False)
        kept.append(client.submit(same, there, workers=[b], pure=False))
        del there
    # Whatever memory is free on the sender is written to.
    filled = [client.submit(make, 100 + i, workers=[a], pure=False) for i in range(5)]
    for seed, copy in enumerate(kept):
        assert client.submit(equal, copy, seed, workers=[b], pure=False).result()
    assert borrowed(client)[b] - before == 5 * 4 * COUNT
    assert filled


@needs_others
def test_clients_are_sent_everything(pair):
    client, (a, b) = pair
    before = borrowed(client)
    assert equal(client.submit(make, 1, workers=[a], pure=False).result(), 1)
    assert borrowed(client) == before


@needs_others
def test_what_was_borrowed_is_among_the_workers_metrics(pair):
    client, (a, b) = pair
    assert pass_one(client, a, b, 1)

    def reported():
        workers = about_workers(client)
        return {address: w["metrics"]["taskgrad_cross_memory"] for address, w in workers.items()}

    assert wait_until(lambda: reported() == borrowed(client))


@needs_others
def test_a_read_that_fails_is_a_transfer_by_the_wire(pair):
    client, (a, b) = pair
    client.run(refuse_reads, workers=[b])
    before = borrowed(client)
    for seed in range(7):
        assert pass_one(client, a, b, seed)
    assert borrowed(client) == before
    # Since it can read a token it was probed again, but not for ever.
    assert readers(client, a) == []
    assert pass_one(client, b, a, 1)  # the other way nothing is wrong
    assert borrowed(client) == {**before, a: before[a] + 4 * COUNT}


@needs_others
def test_the_first_message_is_whole(strangers):
    """The receiver is probed meanwhile, once."""
    client, (a, b) = strangers
    before = borrowed(client)
    assert pass_one(client, a, b, 0)
    assert borrowed(client) == before
    assert wait_until(lambda: readers(client, a) == [b])
    look = lambda dask_worker: peers._registries[dask_worker].readers.attempts[b]  # noqa: E731
    assert client.run(look, workers=[a]) == {a: 1}


@needs_call
def test_who_cannot_read_is_lent_nothing(strangers):
    client, (a, b) = strangers
    client.run(refuse_reads, 0)
    before = borrowed(client)
    for seed in range(5):
        assert pass_one(client, a, b, seed)
        assert readers(client, a) == []
    assert borrowed(client) == before


def lends(client: Client) -> set[bool]:
    """Whether the workers lend; that they do in every respect, or in none."""

    def look(dask_worker):
        handler = dask_worker.handlers["get_data"]
        known = dask_worker.handlers.get(peers.PROBE, hang_up) is not hang_up
        assert known == (handler != dask_worker.get_data) == (dask_worker in peers._registries)
        looks = hasattr(distributed.worker.get_data_from_worker, "taskgrad")
        assert known == looks == (dask_worker in result_table._tables)
        return known

    return set(client.run(look).values())


def put_another_over_it(dask_worker: Worker) -> None:
    ours = dask_worker.handlers["get_data"]

    async def theirs(comm, **message):
        return await ours(comm, **message)

    dask_worker.handlers["get_data"] = dask_worker.theirs = theirs


def another_stayed(dask_worker: Worker) -> bool:
    stays = dask_worker.handlers["get_data"] is dask_worker.theirs
    return stays and dask_worker not in peers._registries


def borrowed_in_three(client: Client) -> int:
    """Bytes borrowed in as many transfers from one worker to the other."""
    a, b = sorted(client.nthreads())
    before = borrowed(client)[b]
    for seed in range(3):
        assert pass_one(client, a, b, seed)
    return borrowed(client)[b] - before


@needs_others
def test_it_comes_with_the_first_user_and_goes_with_the_last():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as observer,
    ):
        with (
            dask.config.set({"taskgrad.cross-memory.enabled": False}),
            Client(cluster, set_as_default=False) as client,
        ):
            use(client)
            assert borrowed_in_three(client) == 0
            assert lends(observer) == {False}
        for _ in range(2):
            with Client(cluster, set_as_default=False) as client:
                a, b = use(client)[1]
                assert wait_until(lambda: lends(observer) == {True})
                acquaint(client, a, b)
                assert borrowed_in_three(client) == 3 * 4 * COUNT
            assert wait_until(lambda: lends(observer) == {False})
        with Client(cluster, set_as_default=False) as client:
            use(client)
            assert wait_until(lambda: lends(observer) == {True})
            acquaint(client, a, b)
            client.run(put_another_over_it)
        assert wait_until(lambda: all(observer.run(another_stayed).values()))
        assert borrowed_in_three(observer) == 0


SPILL_ALL_BUT_ONE = {
    "distributed.worker.memory.target": 0.006,  # of 2 GiB: 13 MB
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}


@needs_others
@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"security": True}),
        ({}, {"processes": False, "protocol": "tcp"}),
        ({"distributed.comm.compression": "zlib"}, {}),
        (SPILL_ALL_BUT_ONE, {"memory_limit": "2GiB"}),
        ({"distributed.comm.offload": False}, {}),
    ],
    ids=["tls", "one_process", "compressed", "spilling", "not_offloaded"],
)
def test_on_another_kind_of_cluster(config, options):
    maker = partial(make, count=2_000_000)  # 8 MB
    with (
        dask.config.set(config),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", **options
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _, (a, b) = use(client)
        acquaint(client, a, b)
        before = borrowed(client)[b]
        # Where workers spill, each goes to disk while another comes from there to be sent.
        there = [client.submit(maker, seed, workers=[a], pure=False) for seed in range(6)]
        assert wait_until(lambda: all(t.done() for t in there), 200)
        for seed, t in enumerate(there):
            same = client.submit(equal, t, seed, maker, workers=[b], pure=False)
            assert same.result(timeout=200)
        assert borrowed(client)[b] - before == 6 * 4 * 2_000_000


@contextmanager
def worker_process(client: Client, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with this address; at the end, or before, it is killed."""
    known = len(client.nthreads())
    command = [sys.executable, "-m", "distributed.cli.dask_worker", client.scheduler.address]
    command += ["--no-nanny", "--no-dashboard", "--nthreads=1"]
    command += [f"--host={host}", f"--worker-port={port}"]
    paths = os.pathsep.join(sys.path)  # with the functions of this file
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    try:
        client.wait_for_workers(known + 1, timeout=200)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def empty() -> Iterator[Client]:
    """A client of a cluster without workers."""
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@needs_call
@pytest.mark.long
def test_two_hosts(empty):
    with worker_process(empty, "127.0.0.1", 0), worker_process(empty, "127.0.0.2", 0):
        client, (a, b) = use(empty)
        for seed in range(3):
            assert pass_one(client, a, b, seed)
            assert pass_one(client, b, a, seed)
        assert set(borrowed(client).values()) == {0}


@needs_others
@pytest.mark.long
def test_a_killed_worker_that_comes_back_at_its_address(empty):
    port = open_port()
    with worker_process(empty, "127.0.0.1", 0):
        with worker_process(empty, "127.0.0.1", port) as process:
            client, (a, b) = use(empty)
            acquaint(client, a, b)
            acquaint(client, b, a)
            process.kill()
            assert wait_until(lambda: len(client.nthreads()) == 1)
        with worker_process(empty, "127.0.0.1", port):
            assert sorted(client.nthreads()) == [a, b]
            for seed in range(3):
                assert pass_one(client, a, b, seed)
                assert pass_one(client, b, a, seed)
            assert wait_until(lambda: [readers(client, w) for w in (a, b)] == [[b], [a]])
            before = borrowed(client)
            assert pass_one(client, a, b, 1)
            assert pass_one(client, b, a, 1)
            assert borrowed(client) == {w: before[w] + 4 * COUNT for w in (a, b)}
