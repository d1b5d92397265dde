"""Workers are called what they were started as, with the address beside it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import about_workers
from helpers import future_of
from taskgrad.plan.plan import Plan
from taskgrad.worker.store import Store
from taskgrad.worker_names import WorkerName

SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def named(fresh, tmp_path):
    """A cluster of two workers that were started as a and b; their addresses by name."""
    client = fresh(n_workers=0)
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    options = ["--nthreads", "1", "--local-directory", str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, *command, *options, "--name", name],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        for name in ("b", "a")
    ]
    try:
        client.wait_for_workers(2, timeout=200)
        with client.as_current():
            yield {w["name"]: address for address, w in about_workers(client).items()}
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


class Fails(nn.Module):
    def forward(self, x):
        if bool((x.abs() > 100).any()):
            raise ValueError("too large")
        return x


def network():
    return nn.Sequential(nn.Linear(2, 2), Fails(), nn.Linear(2, 1))


def test_names_are_shown_with_their_addresses(named, tmp_path):
    shown = {name: f"{name} ({address})" for name, address in named.items()}
    chain = tg.GraphChain(network(), placement=["a", "b", "b"])

    rows = chain.placement
    assert rows.column("worker") == [named["a"], named["b"], named["b"]]
    assert rows.column("worker_name") == ["a", "b", "b"]
    lines = repr(rows).splitlines()
    assert shown["a"] in lines[2]
    assert shown["b"] in lines[3]
    assert shown["a"] in rows._repr_html_()
    assert shown["b"] in repr(chain.memory())

    x, y = torch.ones(4, 2), torch.ones(4, 1)
    assert all(name in chain._repr_html_() for name in shown.values())
    assert shown["b"] in chain(x).persist()._repr_html_()

    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)
    plan = trainer.plan
    text = str(plan).splitlines()
    assert f"on {shown['a']}, cpu" in text[1]
    assert text[3].startswith("a: F0.0")
    assert Plan.from_json(plan.to_json()) == plan

    for executor in ("compiled", "futures"):
        trainer = tg.Trainer(chain, F.mse_loss, SGD, executor=executor)
        with pytest.raises(tg.LayerError) as failed:
            trainer.step(x * 1000, y).item()
        assert f"layer '1' (Fails) on worker {shown['b']} raised ValueError" in str(failed.value)
        assert failed.value.worker == named["b"]
    with pytest.raises(tg.LayerError, match="on worker b ") as failed:
        tg.collect(chain(x * 1000))
    assert failed.value.worker == named["b"]

    with pytest.raises(ZeroDivisionError) as item:
        tg.map(lambda i: 1 / i, [0], over="processes")
    assert any(f"on worker {name}" in item.value.__notes__[0] for name in shown.values())
    with pytest.raises(ZeroDivisionError) as item:
        list(tg.imap(lambda i: 1 / i, [0]))
    assert any(f"on worker {name}" in item.value.__notes__[0] for name in shown.values())

    unknown = f"0: {shown['a']}; 1: {shown['b']}|0: {shown['b']}; 1: {shown['a']}"
    with pytest.raises(tg.PlacementError, match=unknown.replace("(", r"\(").replace(")", r"\)")):
        tg.GraphChain(network(), placement=["c", "a", "a"])

    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    folder = tmp_path / "files"
    folder.mkdir()
    trainer.save(folder / "saved")
    tensors = next((folder / "saved").rglob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(tg.CheckpointError):
        tg.Trainer.restore(folder / "saved", chain, F.mse_loss, SGD)


def test_a_lost_worker_is_named(named):
    chain = tg.GraphChain(network(), placement=["a", "b", "b"])
    future = future_of(chain.layout.shards[1], chain.layout.session.client)
    assert future.status == "finished"
    error = chain.layout.session.describe(named["b"])
    assert error == f"worker b ({named['b']})"


def test_an_error_of_a_store_names_its_worker(tmp_path):
    store = Store(WorkerName("tcp://10.0.0.7:4040", "a"), str(tmp_path))
    with pytest.raises(tg.TapeError, match=r"worker a \(tcp://10\.0\.0\.7:4040\) holds no tape"):
        store.tape("forward:0-1", keep=False)


def test_a_name_that_is_the_address_is_shown_once():
    address = "tcp://10.0.0.7:4040"
    assert str(WorkerName(address, address)) == str(WorkerName(address)) == address
    assert str(WorkerName(address, 0)) == f"0 ({address})"
    assert WorkerName(address, address).short == address
