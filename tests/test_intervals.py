"""The settings that hold while somebody uses taskgrad on a cluster, and only then."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import dask
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from conftest import wait_until
from taskgrad.cluster import internals
from taskgrad.cluster.config import Settings, merge

STOCK = {"workers": {0.005}, "clients": {0.002}, "from workers": {0.002}}
FAST = {"workers": {0}, "clients": {0}, "from workers": {0}}


@pytest.fixture(scope="module")
def cluster_of_one():
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def observer(cluster_of_one):
    """A client that does not use taskgrad itself; nobody does when a test starts or ends."""
    with Client(cluster_of_one, set_as_default=False) as client:
        assert wait_until(lambda: intervals(client) == STOCK)
        yield client
        assert wait_until(lambda: intervals(client) == STOCK)
        assert sending(client) == 0.010


def intervals(client: Client) -> dict[str, set[float]]:
    """The intervals of all streams between scheduler, workers and clients, but the client's own."""
    found = client.run_on_scheduler(_of_scheduler)
    return {**found, "from workers": set(client.run(_of_worker).values())}


def _of_scheduler(dask_scheduler):
    return {
        "workers": {float(s.interval) for s in dask_scheduler.stream_comms.values()},
        "clients": {float(s.interval) for s in dask_scheduler.client_comms.values()},
    }


def _of_worker(dask_worker):
    return float(dask_worker.batched_stream.interval)


def sending(client: Client) -> float | None:
    [stream] = internals.streams(client)
    return internals.interval_of(stream)


def use(client: Client) -> tg.GraphChain:
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)
    return chain


def test_intervals_fall_with_the_first_chain_and_come_back_with_the_last_client(observer):
    with Client(observer.scheduler.address) as first:
        assert intervals(observer) == STOCK
        use(first)
        assert wait_until(lambda: intervals(observer) == FAST)
        assert sending(first) == 0
        with Client(observer.scheduler.address) as second:
            assert wait_until(lambda: intervals(observer) == FAST)  # also for who only looks on
            use(second)
            assert sending(second) == 0
        assert intervals(observer) == FAST
        use(first)
    assert wait_until(lambda: intervals(observer) == STOCK)


def test_a_worker_that_joins_later(observer, cluster_of_one):
    with Client(observer.scheduler.address) as client:
        use(client)
        cluster_of_one.scale(2)
        client.wait_for_workers(2, timeout=200)
        assert wait_until(lambda: intervals(observer) == FAST)
        assert len(observer.run(_of_worker)) == 2
    assert wait_until(lambda: intervals(observer) == STOCK)
    cluster_of_one.scale(1)
    assert wait_until(lambda: len(observer.nthreads()) == 1)


def test_restarted_workers(observer):
    with Client(observer.scheduler.address) as client:
        use(client)
        client.restart()
        assert wait_until(lambda: intervals(observer) == FAST)
        use(client)


def test_a_killed_driver_is_gone(observer):
    script = f"""
        import os, signal, torch, taskgrad as tg
        from distributed import Client
        client = Client({observer.scheduler.address!r})
        chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        tg.collect(chain(torch.ones(1, 2)))
        print("used", flush=True)
        input()
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout.readline() == "used\n"
        assert wait_until(lambda: intervals(observer) == FAST)
    finally:
        driver.kill()
        driver.communicate()
    assert wait_until(lambda: intervals(observer) == STOCK)


def test_switched_off(observer):
    with (
        dask.config.set({"taskgrad.latency.enabled": False}),
        Client(observer.scheduler.address) as client,
    ):
        use(client)
        assert intervals(observer) == STOCK
        assert sending(client) == 0.010


def test_the_shortest_interval_that_anybody_asks_for(observer):
    one_ms = {key: {0.001} for key in FAST}
    with dask.config.set({"taskgrad.latency.interval": "1ms"}):
        slow = Client(observer.scheduler.address)
        use(slow)
    assert wait_until(lambda: intervals(observer) == one_ms)
    assert sending(slow) == 0.001
    with Client(observer.scheduler.address) as fast:
        use(fast)
        assert wait_until(lambda: intervals(observer) == FAST)
    assert wait_until(lambda: intervals(observer) == one_ms)
    slow.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("taskgrad.latency.enabled", "perhaps"),
        ("taskgrad.latency.interval", "soon"),
        ("taskgrad.latency.interval", "-1ms"),
        ("taskgrad.latency.interval", None),
        ("taskgrad.allocator.enabled", 2),
        ("taskgrad.cross-memory.enabled", "no"),
        ("taskgrad.profile", "soon"),
        ("taskgrad.profile", True),
        ("taskgrad.tick", True),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(key, value):
    with dask.config.set({key: value}), pytest.raises(ValueError, match=key):
        Settings.from_config()


def test_settings_from_the_config():
    default = Settings(
        latency=0.0, allocator=True, cross_memory=True, pause=0.93, profile=0.1, tick=0.2
    )
    assert Settings.from_config() == default
    with dask.config.set({"taskgrad.latency.interval": 3}):
        assert Settings.from_config() == replace(default, latency=0.003)
    with dask.config.set({"taskgrad.cross-memory.enabled": False}):
        assert Settings.from_config() == replace(default, cross_memory=False)


def test_settings_when_the_defaults_were_loaded_inside_a_with():
    before = dask.config.config.pop("taskgrad")
    try:
        with dask.config.set({"taskgrad.allocator.enabled": False}):
            assert not Settings.from_config().allocator
        assert Settings.from_config().allocator
    finally:
        dask.config.config["taskgrad"] = before


wishes = st.builds(
    Settings,
    latency=st.none() | st.floats(0, 0.01, allow_nan=False),
    allocator=st.booleans(),
    cross_memory=st.booleans(),
)


@given(st.lists(wishes))
def test_what_holds_is_what_those_want_who_are_there(there):
    found = merge(there)
    assert found.allocator == any(w.allocator for w in there)
    assert found.cross_memory == any(w.cross_memory for w in there)
    asked = [w.latency for w in there if w.latency is not None]
    assert found.latency == (min(asked) if asked else None)
    assert Settings(**found.message()) == found
    assert merge([]) == Settings()
