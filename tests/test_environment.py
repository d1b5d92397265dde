"""Whether client, scheduler and workers fit together; versions are in test_errors.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import about_workers
from helpers import long


def environment_without(folder, packages):
    """A folder that has all that is installed here, except these packages."""
    folder.mkdir()
    installed = Path(sysconfig.get_path("purelib"))
    sources = [e for e in installed.iterdir() if e.suffix != ".pth"]
    for entry in [*sources, Path(tg.__file__).parent]:
        if not entry.name.startswith(packages) and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    return str(folder)


@pytest.mark.parametrize("packages", [("torch",), *long(("torch", "taskgrad", "numpy"))])
def test_a_worker_without_a_package_is_named_at_once(fresh, tmp_path, packages):
    client = fresh(n_workers=1)
    python = os.path.realpath(sys.executable)  # outside of a virtual environment
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    worker = subprocess.Popen(
        [python, *command, "--name", "bare", "--local-directory", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": environment_without(tmp_path / "packages", packages)},
    )
    try:
        client.wait_for_workers(2, timeout=200)
        [address] = [a for a, w in about_workers(client).items() if w["name"] == "bare"]
        for use in (
            lambda: tg.collect(tg.spawn(torch.ones, 2)),
            lambda: tg.map(abs, [1, 2]),
            lambda: list(tg.imap(abs, [1, 2])),
            lambda: tg.pmap(abs)(torch.ones(2)),
            lambda: tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client),
        ):
            with pytest.raises(tg.ClusterMismatchError, match="Install the same") as failed:
                use()
            for package in set(packages) - {"numpy"}:  # it comes with torch
                found = rf"{package}: client .*, worker bare \({address}\) has none"
                assert re.search(found, str(failed.value))
            assert f"taskgrad cannot be imported by worker bare ({address})" in str(failed.value)
    finally:
        worker.kill()
        worker.wait(30)


@contextmanager
def worker_with_threads(client, folder, count):
    """A worker started by hand, in which torch uses that many threads."""
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    expected = len(client.nthreads()) + 1
    worker = subprocess.Popen(
        [sys.executable, *command, "--nthreads", "1", "--local-directory", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)},
    )
    try:
        client.wait_for_workers(expected, timeout=200)
        yield
    finally:
        worker.kill()
        worker.wait(30)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "numbers of threads" in r.getMessage()]


@pytest.mark.parametrize("late", [False, *long(True)])
def test_workers_whose_torch_threads_differ_are_listed_once(fresh, tmp_path, caplog, late):
    client = fresh(n_workers=1)  # Dask's nanny starts it with OMP_NUM_THREADS=1
    [first] = client.nthreads()
    if late:
        tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    with worker_with_threads(client, tmp_path, 2):
        tg.collect(tg.spawn(torch.sum, torch.ones(2), worker=first))
        assert len(warnings(caplog)) == (0 if late else 1)  # until a chain is on the late one
        [second] = client.nthreads().keys() - {first}
        for _ in range(2):
            model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            chain = tg.GraphChain(model, client=client, placement=[first, second])
            assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)
    [warning] = warnings(caplog)
    rows = warning.splitlines()[1:-1]
    assert rows == [f"  client: {torch.get_num_threads()}", f"  0 ({first}): 1", f"  {second}: 2"]
    assert "OMP_NUM_THREADS" in warning.splitlines()[-1]


def test_a_client_with_another_number_of_threads_is_nothing_to_warn_of(fresh, caplog):
    client = fresh(n_workers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    finally:
        torch.set_num_threads(before)
    assert warnings(caplog) == []
