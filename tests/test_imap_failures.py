"""Streaming maps when workers die, when the scheduler goes, and for very long."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import numpy as np
import psutil
import pytest
from distributed import Client

import taskgrad as tg
from conftest import wait_until
from helpers import long
from test_imap import double, nothing_left, results_into


@pytest.mark.parametrize("size", [10, *long(200_000)])
def test_a_worker_that_dies_in_the_middle(
    fresh: Callable[..., Client], tmp_path: Any, size: int
) -> None:
    client = fresh(n_workers=2)

    def once(x: np.ndarray) -> np.ndarray:
        if x[0] == 100 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        time.sleep(0.001)
        return x + 1

    source = (np.full(size, i) for i in range(300))
    for i, y in enumerate(tg.imap(once, source, client=client)):
        assert y.shape == (size,)
        assert (y == i + 1).all()
    assert i == 299
    assert (tmp_path / "died").exists()
    assert wait_until(lambda: nothing_left(client))


def test_an_item_that_ends_every_worker_is_named(fresh: Callable[..., Client]) -> None:
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        client = fresh(n_workers=2)

        def ends(i: int) -> int:
            return os._exit(1) if i == 30 else i

        seen: list[int] = []
        results = tg.imap(ends, range(60), chunksize=4, client=client)
        with pytest.raises(tg.WorkerLostError, match=r"items 28 to 31 of the map of 'ends'.* died"):
            results_into(seen, results)
        assert seen == list(range(28))
        client.wait_for_workers(2, timeout=200)
        assert list(tg.imap(double, range(9), client=client)) == [2 * i for i in range(9)]
        assert wait_until(lambda: nothing_left(client))


def test_a_scheduler_that_is_closed(fresh: Callable[..., Client]) -> None:
    client = fresh(n_workers=1)
    results = tg.imap(_slowly, itertools.count(), client=client)
    assert next(results) == 0
    threading.Timer(0.3, client.cluster.close).start()
    with pytest.raises(tg.TaskgradError, match=r"scheduler"):
        results_into([], results)


def test_a_client_that_is_closed(fresh: Callable[..., Client]) -> None:
    client = fresh(n_workers=1)
    results = tg.imap(_slowly, itertools.count(), client=client)
    assert next(results) == 0
    client.close()
    with pytest.raises(tg.TaskgradError, match=r"closed, after \d+ results of the map"):
        results_into([], results)


def test_no_worker_for_long(fresh: Callable[..., Client]) -> None:
    client = fresh(n_workers=1)
    results = tg.imap(_slowly, itertools.count(), client=client)
    assert next(results) == 0
    with dask.config.set({"taskgrad.worker-deadline": "1s"}):
        client.cluster.scale(0)
        with pytest.raises(tg.WorkerLostError, match=r"items \d+ to \d+ .* all workers are gone"):
            results_into([], results)


def test_a_worker_that_joins_is_used(fresh: Callable[..., Client]) -> None:
    client = fresh(n_workers=1)
    seen: set[int] = set()
    end = time.monotonic() + 30
    for i, pid in enumerate(tg.imap(_pid, itertools.count(), chunksize=2, client=client)):
        if i == 10:
            client.cluster.scale(2)
        seen.add(pid)
        if len(seen) == 2:
            break
        assert time.monotonic() < end
    assert len(seen) == 2


def _slowly(i: int) -> int:
    time.sleep(0.005)
    return i


def _pid(i: int) -> int:
    time.sleep(0.005)
    return os.getpid()


@pytest.mark.long
def test_memory_is_flat_over_200_000_items(client: Client) -> None:
    """As much after 200,000 items of 4 KB as after a quarter of them, in every process."""
    processes = {
        "driver and scheduler": psutil.Process(),
        **{address: psutil.Process(pid) for address, pid in client.run(os.getpid).items()},
    }

    def rss() -> dict[str, int]:
        return {name: process.memory_info().rss for name, process in processes.items()}

    def source() -> Iterator[bytes]:
        for i in range(200_000):
            yield i.to_bytes(8, "little") * 512

    before: dict[str, int] = {}
    for i, y in enumerate(tg.imap(bytes.upper, source(), client=client)):
        if i == 50_000:
            before = rss()
        del y
    assert i == 199_999
    grown = {name: (rss()[name] - before[name]) / 2**20 for name in processes}
    # Each worker has had 300 MiB of items since, and as much of results: held anywhere, even one
    # way only, that would show. The window is 64 MiB, and may have filled up since.
    assert all(mib < 120 for mib in grown.values()), grown
