"""Real clusters of worker processes, one a session."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from distributed import Client

import taskgrad as tg
from taskgrad.cluster.tasks import held

torch.set_num_threads(1)  # as the workers: the same operations give the same bits


@pytest.fixture(scope="session")
def cluster() -> Iterator[Client]:
    """Two worker processes of one thread."""
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    yield client
    client.close()


@pytest.fixture
def client(cluster: Client) -> Iterator[Client]:
    """The session's cluster; after the test, whatever it made must be gone from the workers."""
    yield cluster


@pytest.fixture
def fresh() -> Iterator[Callable[..., Client]]:
    """Makes clusters of the test's own, for tests that break them or need another shape."""
    made: list[Client] = []

    def make(**kwargs: object) -> Client:
        made.append(tg.local_cluster(**{"dashboard_address": ":0", **kwargs}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def total_held(client: Client) -> dict[str, int]:
    """What the stores of all workers hold."""
    totals: dict[str, int] = {}
    for counts in client.run(held).values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether the condition came true in time; releases travel to the workers in messages."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        gc.collect()
        time.sleep(0.02)
    return True
