"""Every error is a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import Client, nanny
from torch import nn

import taskgrad as tg
from conftest import keys_of
from helpers import long
from taskgrad.cluster import session as sessions


@pytest.fixture
def nothing_submitted(client):
    before = keys_of(client, "")
    yield
    assert keys_of(client, "") == before


def linear(n=2):
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(n)])


@pytest.mark.usefixtures("nothing_submitted")
class TestBeforeAnyTaskIsSubmitted:
    @pytest.mark.parametrize("model", [torch.relu, "resnet50", None, [nn.Linear(2, 2)]])
    def test_not_a_module(self, client, model):
        with pytest.raises(TypeError, match=r"GraphChain takes an nn.Module.*got"):
            tg.GraphChain(model, client=client)

    @pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Sequential())])
    def test_empty_chain(self, client, model):
        with pytest.raises(ValueError, match="the chain is empty.*at least one layer"):
            tg.GraphChain(model, client=client)

    def test_layer_that_cannot_be_pickled(self, client):
        class Locked(nn.Module):
            def __init__(self):
                super().__init__()
                self.lock = threading.Lock()

        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Locked()))
        with pytest.raises(TypeError, match=r"layer '1\.0' \(Locked\).*cannot be pickled.*lock"):
            tg.GraphChain(model, client=client)

    @pytest.mark.parametrize("worker", [7, -1, "nobody", "tcp://127.0.0.1:1"])
    def test_unknown_worker(self, client, worker):
        with pytest.raises(tg.PlacementError, match=f"no worker {worker!r}.*Its workers are 0: "):
            tg.GraphChain(linear(), client=client, placement=[0, worker])
        with pytest.raises(tg.PlacementError, match="no worker"):
            tg.spawn(torch.relu, torch.ones(1), worker=worker)

    @pytest.mark.parametrize("placement", [[0], [0, 1, 0], []])
    def test_wrong_placement_length(self, client, placement):
        with pytest.raises(tg.PlacementError, match=f"names {len(placement)} workers.*2 layers"):
            tg.GraphChain(linear(), client=client, placement=placement)

    @pytest.mark.parametrize("placement", ["balanced", [0, None], [0, 1.5]])
    def test_bad_placement(self, client, placement):
        with pytest.raises(tg.PlacementError, match="placement|index"):
            tg.GraphChain(linear(), client=client, placement=placement)

    def test_lazy_module(self, client):
        with pytest.raises(ValueError, match="uninitialized.*run the model once"):
            tg.GraphChain(nn.Sequential(nn.LazyLinear(3)), client=client)

    def test_meta_tensors(self, client):
        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.by = nn.Parameter(torch.ones(2))

        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 2), Scale())
        with pytest.raises(ValueError, match=r"'1\.by' of module '1' \(Scale\) is on the meta.*no"):
            tg.GraphChain(model, client=client)

    def test_spawn_of_what_cannot_be_called_or_pickled(self):
        with pytest.raises(TypeError, match="spawn takes a function"):
            tg.spawn(torch.ones(2))
        lock = threading.Lock()
        with pytest.raises(TypeError, match="cannot be pickled"):
            tg.spawn(lambda x: lock, torch.ones(1))
        with pytest.raises(TypeError, match="argument of 'relu'.*cannot be pickled"):
            tg.spawn(torch.relu, lock)

    def test_no_grad_thunk(self, client):
        with torch.no_grad():
            y = tg.spawn(torch.sum, torch.ones(2, requires_grad=True))
        with pytest.raises(tg.TapeError, match=r"made .* under torch\.no_grad.*Make it again"):
            y.backward()

    def test_nothing_needs_a_gradient(self, client):
        with pytest.raises(tg.TapeError, match="needs no gradient"):
            tg.spawn(torch.sum, torch.ones(2)).backward()

    def test_a_thunk_cannot_be_pickled(self, client):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(tg.spawn(torch.sum, torch.ones(2)))

    def test_function_that_does_not_spawn(self, client):
        with pytest.raises(TypeError, match="must return thunks"):
            tg.vjp(lambda x: 3, torch.ones(2))

    def test_asynchronous_client(self, client):
        async def use():
            async with Client(client.scheduler.address, asynchronous=True) as own:
                tg.GraphChain(linear(), client=own)

        with pytest.raises(tg.TaskgradError, match="synchronous client"):
            asyncio.run(use())

    def test_not_a_client(self):
        with pytest.raises(TypeError, match=r"must be a distributed\.Client"):
            tg.GraphChain(linear(), client="tcp://127.0.0.1:8786")


def test_state_that_does_not_fit(client):
    chain = tg.GraphChain(linear(), client=client)
    before = keys_of(client, "")
    state = {"0.weight": torch.ones(3, 2), "9.weight": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Missing.*0\.bias.*Unexpected.*9\.weight.*Wrong"):
        chain.load_state_dict(state)
    assert keys_of(client, "") == before


@pytest.mark.parametrize(
    ("cotangent", "match"),
    [
        (torch.ones(4, 3), r"float32\[4, 3\].*output is float32\[4, 2\]"),
        (torch.ones(4, 2, dtype=torch.float64), r"float64\[4, 2\].*float32\[4, 2\]"),
        ([torch.ones(4, 2)], "another structure"),
        (3.0, "holds a float"),
    ],
)
@pytest.mark.parametrize("collected", [True, False])
def test_cotangent_that_does_not_match(client, cotangent, match, collected):
    chain = tg.GraphChain(linear(), client=client, placement=[0, 1])
    y, back = tg.vjp(chain, torch.ones(4, 2))
    if collected:  # then it is known before a task is submitted, and the tape is not lost
        tg.collect(y)
        before = keys_of(client, "")
        with pytest.raises(tg.CotangentError, match=match):
            back(cotangent)
        assert keys_of(client, "") == before
        tg.collect(back(torch.ones(4, 2)))
    else:
        with pytest.raises(tg.CotangentError, match=match):
            tg.collect(back(cotangent))


def test_cotangent_for_an_integer_output(client):
    y = tg.spawn(lambda x: (x * 2, x.argmax()), torch.ones(3, requires_grad=True))
    with pytest.raises(tg.CotangentError, match="carries no gradient"):
        y.backward((torch.ones(3), torch.tensor(1)))


def test_backward_of_something_not_scalar(client):
    with pytest.raises(tg.CotangentError, match=r"needs a scalar output.*float32\[3\]"):
        tg.spawn(torch.sin, torch.ones(3, requires_grad=True)).backward()


class Inner(nn.Module):
    def forward(self, x):
        return self.deeper(x)

    def deeper(self, x):
        return x.view(7)


def test_shape_mismatch_names_layer_worker_and_shapes(client):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 2)))
    chain = tg.GraphChain(model, client=client, placement=[0, 1])
    with pytest.raises(tg.LayerError) as caught:
        tg.collect(chain(torch.ones(4, 2)))
    error = caught.value
    assert error.layer == "1.0"
    assert error.worker == chain.placement[1].worker
    for part in ("'1.0' (Linear)", error.worker, "float32[4, 2]", "mat1 and mat2", "linear.py"):
        assert part in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_the_layers_own_traceback_is_shown(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Inner()), client=client)
    with pytest.raises(tg.LayerError, match=r"in deeper[\s\S]*x\.view\(7\)"):
        tg.collect(chain(torch.ones(4, 2)))
    # The chain is usable afterwards.
    with pytest.raises(tg.LayerError):
        F.mse_loss(tg.collect(chain(torch.ones(4, 2))), torch.ones(4, 2)).backward()


def test_closed_client(fresh):
    client = fresh(n_workers=1)
    chain = tg.GraphChain(linear(), client=client)
    y = chain(torch.ones(1, 2))
    client.close()
    with pytest.raises(tg.TaskgradError, match="client is closed.*Open a client"):
        tg.collect(y)
    with pytest.raises(tg.TaskgradError, match="client is closed"):
        tg.GraphChain(linear(), client=client)


def test_cluster_without_workers(fresh):
    client = fresh(n_workers=0)
    with pytest.raises(tg.PlacementError, match="has no workers"):
        tg.GraphChain(linear(), client=client)


@pytest.mark.parametrize("package", ["taskgrad", *long("torch")])
def test_worker_with_another_version(fresh, tmp_path, package):
    """A real worker, in front of whose path stands another release."""
    info = tmp_path / f"{package}-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    client = fresh(n_workers=0)
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    worker = subprocess.Popen(
        [sys.executable, *command, "--local-directory", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        client.wait_for_workers(1, timeout=200)
        found = rf"{package}: client .*, worker tcp.* 0\.0\.1[\s\S]*Install the same"
        with pytest.raises(tg.ClusterMismatchError, match=found):
            tg.GraphChain(linear(), client=client)
    finally:
        worker.terminate()
        worker.wait(30)


@pytest.mark.parametrize(
    ("package", "version", "shown"), [("torch", None, "has none"), ("python", "3.7.1", "3.7")]
)
def test_versions_that_differ(client, monkeypatch, package, version, shown):
    real = client.get_versions

    async def get_versions(**kwargs):
        found = await real(**kwargs)
        worker = next(iter(found["workers"]))
        found["workers"][worker]["packages"][package] = version
        return found

    monkeypatch.setattr(client, "get_versions", get_versions)
    with pytest.raises(
        tg.ClusterMismatchError, match=rf"{package}: client .* worker \d \(tcp.*{shown}"
    ):
        sessions.Session(client)


def test_worker_that_dies_is_named(fresh):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(linear(), client=client, placement=[0, 1])
    x = torch.ones(1, 2)
    tg.collect(chain(x))
    gone = chain.placement[1].worker

    async def remove(dask_scheduler):
        await dask_scheduler.remove_worker(gone, stimulus_id="test")

    client.run_on_scheduler(remove)
    with pytest.raises(tg.WorkerLostError, match=f"{gone}.*Make the chain again"):
        tg.collect(chain(x))


def test_worker_killed_while_it_runs(fresh):
    client = fresh(n_workers=2)

    def die(x):
        os._exit(1)

    chain = tg.GraphChain(linear(), client=client)
    with pytest.raises(tg.WorkerLostError):
        tg.collect(tg.spawn(die, chain(torch.ones(1, 2)), worker=0))


def test_a_cluster_closes_right_after_a_worker_that_died_as_it_started(fresh, monkeypatch):
    """Its nanny still waits for the process that died, and starts the next one."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        client = fresh(n_workers=1)
    connected, start = nanny.WorkerProcess._wait_until_connected, nanny.AsyncProcess.start

    async def connects_late(*args):
        await asyncio.sleep(0.5)
        return await connected(*args)

    async def starts_late(process):
        await asyncio.sleep(1)
        return await start(process)

    def die(x):
        os._exit(1)

    monkeypatch.setattr(nanny.WorkerProcess, "_wait_until_connected", connects_late)
    monkeypatch.setattr(nanny.AsyncProcess, "start", starts_late)
    with pytest.raises(tg.WorkerLostError):  # it dies twice
        tg.collect(tg.spawn(die, torch.ones(1)))
    client.close()
    assert client.status == client.cluster.status.name == "closed"


def test_code_that_is_not_on_the_worker(client, tmp_path, monkeypatch):
    (tmp_path / "only_on_the_driver.py").write_text(
        "from torch import nn\nclass Here(nn.Identity):\n    pass\ndef here(x):\n    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import only_on_the_driver

    for use in (
        lambda: tg.GraphChain(nn.Sequential(only_on_the_driver.Here()), client=client),
        lambda: tg.collect(tg.spawn(only_on_the_driver.here, torch.ones(1))),
    ):
        with pytest.raises(tg.TaskgradError, match=r"only_on_the_driver.*client\.upload_file"):
            use()


def test_a_persisted_call_that_failed_raises_when_collected_each_time(client):
    y = tg.spawn(Inner(), torch.ones(2)).persist()
    for _ in range(2):
        with pytest.raises(tg.LayerError, match=r"view\(7\)"):
            tg.collect(y)


def test_a_result_that_cannot_travel_is_refused_by_its_task(client):
    y = tg.spawn(lambda x: {"x": x, "rest": (i for i in range(3))}, torch.ones(2))
    with pytest.raises(tg.TravelError, match=r"generator"):
        tg.collect(y)
