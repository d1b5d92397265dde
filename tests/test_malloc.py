"""Workers keep the memory they free while somebody uses taskgrad; a warning about threads."""

from __future__ import annotations

import ctypes
import logging
import resource
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import dask
import pytest
import torch
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster
from torch import nn

import taskgrad as tg
from conftest import wait_until
from taskgrad.cluster import internals
from taskgrad.cluster.tuning import malloc

needs_glibc = pytest.mark.skipif(malloc._glibc() is None, reason="the C library is not glibc")
MIB = 2**20


@pytest.fixture(scope="module")
def cluster_of_one():
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def observer(cluster_of_one):
    with Client(cluster_of_one, set_as_default=False) as client:
        yield client


def use(client: Client) -> None:
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    tg.collect(chain(torch.ones(1, 2)))


def faults(_: object) -> int:
    """Pages that the system has to map for taking and freeing the same memory again and again."""
    for _ in range(20):
        torch.ones(2 * MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(2 * MIB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def mapped(count: int, _: object) -> int:
    """How many of so many blocks of a megabyte come from the system, each by itself."""

    class MallInfo(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_int) for i in range(10)]

    mallinfo = ctypes.CDLL(None).mallinfo
    mallinfo.restype = MallInfo
    before = mallinfo().field3
    blocks = [torch.empty(MIB // 4) for _ in range(count)]
    return mallinfo().field3 - before + 0 * len(blocks)


def fill(_: object) -> int:
    """Take 200 MiB and free them."""
    return len([torch.ones(2 * MIB) for _ in range(25)])


def measure(client: Client, what: Callable[[object], int]) -> int:
    return client.submit(what, object(), pure=False).result()


@needs_glibc
def test_memory_is_kept_while_a_client_uses_taskgrad(observer):
    stock = measure(observer, faults)
    assert stock > 100
    assert measure(observer, partial(mapped, 50)) > 40
    with Client(observer.scheduler.address) as client:
        use(client)
        assert measure(client, faults) < stock / 10
        assert measure(client, partial(mapped, 50)) == 0
    # Room in the heaps of before is used up first.
    assert wait_until(lambda: measure(observer, partial(mapped, 400)) > 200)


@needs_glibc
def test_switched_off(observer):
    with (
        dask.config.set({"taskgrad.allocator.enabled": False}),
        Client(observer.scheduler.address) as client,
    ):
        use(client)
        assert measure(client, partial(mapped, 400)) > 200


@needs_glibc
def test_kept_memory_goes_back_when_the_worker_is_short_of_it(observer):
    def short(dask_worker):
        before = internals.memory_used(dask_worker)
        assert not malloc.relieve(dask_worker)
        limit = malloc._RELIEF
        malloc._RELIEF = 0
        try:
            assert malloc.relieve(dask_worker)
        finally:
            malloc._RELIEF = limit
        return before - internals.memory_used(dask_worker)

    with Client(observer.scheduler.address) as client:
        use(client)
        measure(client, fill)
        [given_back] = client.run(short).values()
        assert given_back > 100 * MIB  # all but the ends of the threads' last heaps


class Other:
    """All that matters here of a second worker in the same process."""

    def __init__(self) -> None:
        self.periodic_callbacks: dict[str, object] = {}


@needs_glibc
def test_the_last_worker_of_a_process_restores(observer):
    def steps(dask_worker):
        other = Other()
        assert malloc.apply(dask_worker)
        assert malloc.apply(dask_worker)
        assert malloc.apply(other)
        found = [len(malloc._wanted_by)]
        for worker in (other, other, dask_worker, dask_worker):
            malloc.restore(worker)
            found.append(len(malloc._wanted_by))
        return found, [k for k in dask_worker.periodic_callbacks if "taskgrad" in k]

    assert list(observer.run(steps).values()) == [([2, 1, 1, 0, 0], [])]


def test_elsewhere_than_on_glibc_nothing_happens_and_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(malloc, "_glibc", lambda: None)
    malloc._log_that_nothing_happens.cache_clear()
    worker = SimpleNamespace(periodic_callbacks={})
    with caplog.at_level(logging.WARNING, logger="taskgrad"):
        assert not malloc.apply(worker)
        assert not malloc.apply(worker)
    assert len(caplog.records) == 1
    assert "not glibc" in caplog.text
    assert not malloc.relieve(worker)
    assert worker.periodic_callbacks == {}


TRIM, PAD, MMAP = -1, -2, -3


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # As Dask's nanny starts a worker: one value given, so that the others stay as they start.
        ({"MALLOC_TRIM_THRESHOLD_": "65536"}, {TRIM: 65536, PAD: 131072, MMAP: 131072}),
        ({"MALLOC_TOP_PAD_": "1"}, {TRIM: 131072, PAD: 1, MMAP: 131072}),
        ({}, {TRIM: 64 * MIB, PAD: 131072, MMAP: 32 * MIB}),
        ({"MALLOC_TRIM_THRESHOLD_": "much"}, {TRIM: 64 * MIB, PAD: 131072, MMAP: 32 * MIB}),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=0x1000:glibc.malloc.tcache_count=1"},
            {TRIM: 131072, PAD: 131072, MMAP: 4096},
        ),
    ],
)
def test_what_is_restored_is_what_the_process_started_with(environment, expected):
    assert malloc.values_before(environment) == expected


def test_threads_that_fit_and_threads_that_do_not(observer):
    def check(n, dask_worker):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            return malloc.check_threads(dask_worker)
        finally:
            torch.set_num_threads(before)

    assert list(observer.run(check, 1).values()) == [None]
    assert list(observer.run(check, CPU_COUNT).values()) == [None]
    [message] = observer.run(check, CPU_COUNT + 1).values()
    assert f"1 tasks at a time with {CPU_COUNT + 1} torch threads" in message
    assert f"on {CPU_COUNT} cores" in message
    assert f"OMP_NUM_THREADS={CPU_COUNT}" in message
