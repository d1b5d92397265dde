"""What is printed beside the one error that counts: nothing."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import taskgrad as tg
from taskgrad.cluster import internals, local, task_logs
from taskgrad.cluster.channels.dask_comms import CHANNEL
from taskgrad.cluster.program_hosts import PROGRAM
from taskgrad.cluster.session import session
from taskgrad.cluster.wire import peers
from taskgrad.cluster.worker_plugin import NAME

HEAD = """
import functools, sys, time, torch, taskgrad as tg
from torch import nn

class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("mine")

class FailsBack(nn.Module):
    def forward(self, x):
        x.register_hook(fails)
        return x * 1

def fails(*args):
    raise ValueError("mine")

def trainer(last, loss=nn.functional.mse_loss, executor="compiled"):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), last))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    return tg.Trainer(chain, loss, sgd, microbatches=2, executor=executor)

x, y = torch.ones(4, 2), torch.ones(4, 2)
if __name__ == "__main__":
"""


def run(body: str, folder: Path, status: int = 0) -> str:
    """What a script prints on stderr, workers included."""
    script = folder / "script.py"
    script.write_text(HEAD + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=250, check=False
    )
    assert found.returncode == status, found.stderr
    return found.stderr


FAILS = """
client = tg.local_cluster(2, dashboard_address=None)
def caught(call):
    try:
        call()
    except (ValueError, tg.TaskgradError) as error:
        assert "mine" in str(error), error
    else:
        raise AssertionError("nothing was raised")
for executor in ("compiled", "futures"):
    for last, loss in ((Fails(), nn.functional.mse_loss), (FailsBack(), nn.functional.mse_loss),
                       (nn.Identity(), fails)):
        caught(lambda: trainer(last, loss, executor).step(x, y).item())
chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Fails()))
caught(lambda: tg.collect(chain(x)))
caught(lambda: tg.collect(tg.spawn(fails)))
caught(lambda: tg.map(fails, [1, 2]))
caught(lambda: list(tg.imap(fails, [1, 2])))
caught(lambda: tg.pmap(fails, "i")(torch.ones(2)))
"""


def test_a_failing_step_or_call_prints_nothing_of_dasks(tmp_path):
    assert run(FAILS, tmp_path) == ""


async def close_plugin(dask_worker):
    await dask_worker.plugin_remove(NAME)  # as `Worker.close` does, which still answers then


def test_a_worker_that_closes_hangs_up_and_logs_nothing(fresh):
    client = fresh(n_workers=2)
    session(client)  # sets up the workers
    a, b = client.scheduler_info()["workers"]

    async def call(names, dask_worker):
        return [await ends(getattr(dask_worker.rpc(b), name)) for name in names]

    async def ends(handler):
        try:
            return await handler()
        except OSError:
            return "gone"

    ours = client.run(lambda dask_worker: [*dask_worker.handlers], workers=[b])[b]
    ours = [name for name in ours if name.startswith("taskgrad")]
    assert {PROGRAM, CHANNEL, peers.PROBE, "taskgrad_held", "taskgrad_rank_fail"} < {*ours}
    client.run(close_plugin, workers=[b])
    assert client.run(call, ours, workers=[a]) == {a: ["gone"] * len(ours)}
    assert not [entry for entry in client.get_worker_logs()[b] if entry[0] != "INFO"]


def test_a_failing_task_of_the_users_own_is_logged_as_before(tmp_path):
    printed = run(
        """
client = tg.local_cluster(1, dashboard_address=None)
try:
    tg.collect(tg.spawn(fails))
except tg.LayerError:
    pass
try:
    client.submit(fails).result()
except ValueError:
    pass
client.close()
""",
        tmp_path,
    )
    assert printed.count("Compute Failed") == 1
    assert "Key:       fails-" in printed


ENDS = {
    "a trainer at work": "t = trainer(nn.Identity())\nfor _ in range(3):\n    t.step(x, y)",
    "as tasks": "t = trainer(nn.Identity(), executor='futures')\nt.step(x, y)",
    "a stream": "stream = tg.imap(abs, range(400))\nnext(stream)",
}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name, marks=[] if name == "a trainer at work" else pytest.mark.long)
        for name, body in ENDS.items()
    ],
)
def test_a_client_that_is_not_closed_ends_in_silence(tmp_path, body):
    assert run(f"client = tg.local_cluster(2, dashboard_address=None)\n{body}", tmp_path) == ""


@pytest.mark.long
def test_an_error_of_the_script_is_all_that_is_printed(tmp_path):
    body = f"client = tg.local_cluster(2)\n{ENDS['a trainer at work']}\nraise ValueError('mine')"
    printed = run(body, tmp_path, status=1)
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("ValueError: mine\n")
    assert printed.count("File ") == 1


@pytest.mark.long
def test_a_cluster_that_is_left_open_ends_in_silence(tmp_path):
    """Its client is closed, and the workers are not: they must not miss the scheduler."""
    body = f"""
from distributed import Client, LocalCluster
cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
client = Client(cluster)
{ENDS["a trainer at work"]}
t.wait()
client.close()
time.sleep(1.5)
"""
    assert run(body, tmp_path) == ""


@pytest.fixture
def taken():
    """A port that is taken."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_taken_port_of_the_dashboard_is_no_warning(taken, monkeypatch, caplog):
    monkeypatch.setattr(local, "_DASHBOARD", taken)
    monkeypatch.setattr(local, "_is_free", lambda port: True)  # it is taken a moment later
    monkeypatch.setattr(local, "_dashboard_address", lambda: f":{taken}", raising=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        client = tg.local_cluster(0, dashboard_address=f":{taken}")
    try:
        assert [w for w in found if "already in use" in str(w.message)] == []
        [record] = [r for r in caplog.records if r.name == "taskgrad"]
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            f"port {taken} is taken, so the dashboard is at {client.dashboard_link}."
        )
    finally:
        client.close()


class Mine(nn.Module):
    def forward(self, x):
        return x


def function(*args):
    return args


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_missing_module_is_one_clear_error(fresh, tmp_path):
    """The worker cannot import this file."""
    client = fresh(n_workers=0)
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    worker = subprocess.Popen(
        [sys.executable, *command, "--local-directory", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        client.wait_for_workers(1, timeout=200)
        with client.as_current():
            linear = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)))
            for call in (
                lambda: tg.GraphChain(nn.Sequential(Mine())),
                lambda: tg.collect(tg.spawn(function, torch.ones(2))),
                lambda: tg.map(function, [1, 2]),
                lambda: list(tg.imap(function, [1, 2])),
                lambda: tg.Trainer(linear, function, torch.optim.SGD),
                lambda: tg.Trainer(linear, nn.functional.mse_loss, optimizer),
                lambda: tg.collect(linear(Mine())),
            ):
                with pytest.raises(tg.TaskgradError, match="No module named 'test_noise'") as found:
                    call()
                printed = "".join(traceback.format_exception(found.value))
                assert printed.count("Traceback") == 1
                assert "code that a layer or function needs is not on this worker" in printed
                remote = (
                    "/worker/",
                    "/graph/",
                    "actions.py",
                    "chunk.py",
                    "serving.py",
                    "/tasks.py",
                )
                assert not any(part in printed for part in (*remote, "/tasks.py")), printed
    finally:
        worker.kill()
        worker.wait(30)


def pictures(folder: Path, **files: int) -> None:
    """Subfolders with so many pictures each."""
    for name, count in files.items():
        (folder / name).mkdir()
        for i in range(count):
            Image.new("RGB", (9, 9), (i, 90, 9)).save(folder / name / f"{i}.png")


@pytest.fixture
def images(monkeypatch):
    """The module of the examples."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module("images")


def test_a_broken_picture_is_left_out_and_named(images, tmp_path):
    pictures(tmp_path, cats=3, dogs=3)
    bad = tmp_path / "cats" / "bad.jpg"
    bad.write_bytes(b"no picture")
    cut = tmp_path / "dogs" / "0.png"
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.warns(UserWarning, match="cannot be read as an image") as warned:
        found = images.image_folder(str(tmp_path), 8)
    assert [str(w.message).split(" cannot")[0] for w in warned] == [str(bad), str(cut)]
    assert (len(found.train_t) + len(found.test_t), found.class_names) == (5, ["cats", "dogs"])


def test_only_broken_pictures_are_an_error_that_names_them(images, tmp_path):
    pictures(tmp_path, cats=2, dogs=2)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(SystemExit, match=r"two classes or more[\s\S]*cats/0\.png cannot be read"),
    ):
        images.image_folder(str(tmp_path), 8)


def test_a_worker_without_a_parent_does_not_log_that_the_scheduler_is_gone(monkeypatch, caplog):
    class Parent:
        alive = True

        def is_alive(self):
            return self.alive

    parent = Parent()
    monkeypatch.setattr(task_logs.multiprocessing, "parent_process", lambda: parent)
    log = logging.getLogger("distributed.worker")
    before = list(log.filters)
    try:
        task_logs.shorten.__wrapped__(lambda: [])
        log.error("Failed to communicate with scheduler during heartbeat.")
        log.error("something else")
        parent.alive = False
        log.error("Failed to communicate with scheduler during heartbeat.")
        log.error("something else")
        log.warning(internals.REMOVED)
    finally:
        for name in internals.WORKER_LOGS:
            logging.getLogger(name).filters[:] = before if name == log.name else []
    kept = [(r.levelno, r.getMessage()[:6]) for r in caplog.records if r.levelno > logging.INFO]
    assert kept == [(logging.ERROR, text) for text in ("Failed", "someth", "someth")]
