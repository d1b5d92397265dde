"""Real clusters of worker processes, one a session."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import forkserver
from typing import Any

import dask
import pytest
import torch
from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import get_mp_context
from hypothesis import HealthCheck, settings

import hostmem
import taskgrad as tg
from taskgrad.cluster.tasks import held

# A slow machine is no reason to fail.
settings.register_profile("taskgrad", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("taskgrad")

os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a worker that crashes says where
# Deterministic algorithms on a GPU want it, in workers from their start.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.set_num_threads(1)  # as the workers: the same operations give the same bits

TEST_DEVICE = os.environ.get("TASKGRAD_TEST_DEVICE", "cuda")
NO_TEST_DEVICE = hostmem.install() if TEST_DEVICE == hostmem.NAME else None


def pytest_sessionstart() -> None:
    """Ctrl-C is tested. A shell's background jobs are started with it ignored, as this may be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> Iterator[None]:
    """Press again where Python drops a KeyboardInterrupt: in the callback of a weak reference."""
    before = sys.unraisablehook

    def dropped(given: Any) -> None:
        if given.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        else:
            before(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", dropped)
        yield


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to go through half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Dask forks its workers from a process that has imported torch, as it can and its tests do.

    Where each imports it for itself, most of the time goes there. Scripts that tests run do that.
    """
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        preload = ["distributed", "torch"]
        if "transformers" in sys.modules:  # tests that have been collected use it
            preload.append("transformers.modeling_utils")
        get_mp_context().set_forkserver_preload(preload)
        with pytest.MonkeyPatch.context() as patch:  # what Dask sets for a process before it starts
            for name, value in dask.config.get("distributed.nanny.pre-spawn-environ").items():
                patch.setenv(name, str(value))
            forkserver.ensure_running()
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Client]:
    """Two worker processes of one thread."""
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    client.register_plugin(Finished())
    yield client
    client.close()


@pytest.fixture
def client(cluster: Client, request: pytest.FixtureRequest) -> Iterator[Client]:
    """The session's cluster; what earlier tests left to the garbage collector is gone from it."""
    if not wait_until(lambda: not any(total_held(cluster).values()), 2):
        cluster.run(gc.collect)  # what tasks left in cycles: chains that were made in a task
        gone = wait_until(lambda: not any(total_held(cluster).values()))
        # The traceback of a test that failed keeps what it had.
        assert gone or request.session.testsfailed, f"an earlier test left {total_held(cluster)}"
    with cluster.as_current():  # and not the cluster that was made last
        yield cluster


@pytest.fixture(scope="session")
def four() -> Iterator[Client]:
    """Four worker processes of one thread."""
    client = tg.local_cluster(n_workers=4, dashboard_address=":0")
    yield client
    client.close()


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


def pytest_itemcollected(item: pytest.Item) -> None:
    """What takes a GPU is among `pytest -m cuda`."""
    if "gpu" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.cuda)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU and, if there is one, a GPU, each with deterministic algorithms."""
    return request.getfixturevalue("gpu") if request.param == "cuda" else "cpu"


@pytest.fixture
def gpu() -> Iterator[str]:
    """A GPU; in its place what the environment variable says, so that tests can be tried."""
    name = TEST_DEVICE
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here; TASKGRAD_TEST_DEVICE=hostmem tries the same without")
    if NO_TEST_DEVICE:
        pytest.skip(NO_TEST_DEVICE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield name
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["compiled", pytest.param("futures", marks=pytest.mark.long)])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both executors of trainers, each as the default one."""
    defaults: dict[str, Any] = tg.Trainer.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "executor", request.param)
    return request.param


def about_workers(client: Client) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of each worker. `Client.scheduler_info` may say that there are none:
    every two seconds the client replaces what that gives by an answer without workers."""
    return client.sync(client.scheduler.identity, n_workers=-1)["workers"]


def total_held(client: Client) -> dict[str, int]:
    """What the stores of all workers hold."""
    totals: dict[str, int] = {}
    for counts in client.run(held).values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def wait_for_another(client: Client, before: Collection[str]) -> None:
    """Wait until another worker has come for one of those before, which was killed."""
    now = client.nthreads
    assert wait_until(lambda: len(now()) == len(before) and set(now()) != set(before), 30)


def keys_of(client: Client, prefix: str) -> set[str]:
    """Keys of the tasks that the scheduler handed to a worker, from its own record."""
    return {key for key, _ in ran_on(client, prefix)}


def ran_on(client: Client, prefix: str) -> set[tuple[str, str]]:
    """(key, worker) of the tasks that workers finished, from the scheduler's own record."""
    return {
        (key, worker)
        for key, worker in client.run_on_scheduler(_finished)
        if key.startswith(prefix)
    }


def _finished(dask_scheduler: object) -> list[tuple[str, str]]:
    return dask_scheduler.plugins["finished"].seen  # type: ignore[attr-defined]


class Finished(SchedulerPlugin):
    """Writes down which worker finished which key."""

    name = "finished"

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def transition(self, key, start, finish, *args, worker=None, **kwargs) -> None:
        if start == "processing" and finish == "memory":
            self.seen.append((str(key), worker))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether the condition came true in time; releases travel to the workers in messages."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        gc.collect()
        time.sleep(0.02)
    return True
