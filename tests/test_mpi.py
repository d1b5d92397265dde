"""`tg.main`: one file under mpirun, on local processes, in one process; and how it ends."""

from __future__ import annotations

import inspect
import json
import logging
import re
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Worker

import taskgrad as tg
from helpers import long_rows
from mpi_jobs import job, run
from taskgrad.launch.worker_rank import _no_failed_heartbeats

HEAD = """\
import glob, json, os, sys, time
import distributed
import numpy as np
import torch
import taskgrad as tg
"""

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(HEAD + textwrap.dedent(text))
        return path

    return write


WORK = """
    def double(x):
        return 2 * x

    def double_batch(indices, x):
        return indices, 2 * x

    def who(_):
        # Not before every worker is in one: none is left out for being slow to start.
        open(f"{sys.argv[0]}.{tg.rank()}", "w").close()
        end = time.monotonic() + 30
        while len(glob.glob(f"{sys.argv[0]}.*")) < max(1, tg.size() - 1):
            assert time.monotonic() < end
            time.sleep(0.01)
        return tg.rank(), tg.size(), os.getpid()

    def batches(x):
        return ((i, x[i]) for i in np.array_split(np.arange(len(x)), 10))

    def unordered(x):
        y = np.zeros_like(x)
        for indices, part in tg.starmap(double_batch, batches(x), unordered=True):
            y[indices] = part
        return y

    def map_gradient():
        w = torch.tensor(3.0, requires_grad=True)
        sum(tg.map(lambda x: w * x, [1.0, 2.0, 4.0])).backward()
        return w.grad.item()

    def sum_over_ranks():
        x = 1.0 + torch.arange(max(1, tg.size() - 1))
        x.requires_grad_()
        y = tg.pmap(lambda v: tg.psum(v * v, "i"), axis_name="i")(x)
        y.sum().backward()
        return y.tolist(), x.grad.tolist()

    def chain_is_torch():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
        x = torch.randn(9, 5)
        y, back = tg.vjp(tg.GraphChain(model), x)
        grads, _ = back(torch.ones(9, 1))
        model(x).sum().backward()
        return all(torch.equal(tg.collect(grads[n]), p.grad) for n, p in model.named_parameters())

    if tg.main(__name__, **json.loads(sys.argv[1])):
        x = np.arange(100)
        ordered = [part for _, part in tg.starmap(double_batch, batches(x))]
        ranks, sizes, pids = map(set, zip(*tg.imap(who, range(8), chunksize=1)))
        print(json.dumps({
            "doubles": list(tg.imap(double, range(20))),
            "ordered": np.concatenate(ordered).tolist(),
            "unordered": unordered(x).tolist(),
            "gradient": map_gradient(),
            "chain": chain_is_torch(),
            "pmap": sum_over_ranks(),
            "ranks": sorted(ranks), "sizes": sorted(sizes), "pids": len({*pids, os.getpid()}),
            "here": [tg.rank(), tg.size()],
        }))
"""


@pytest.mark.parametrize(
    ("ranks", "arguments", "workers"),
    [(3, {}, 2), (None, {"workers": 0}, 0), *long_rows((1, {}, 0), (None, {"workers": 2}, 2))],
    ids=["mpirun -n 3", "in this process", "mpirun -n 1", "local workers"],
)
def test_one_file_runs_with_and_without_mpi(script, ranks, arguments, workers):
    status, out, err = run(script(WORK), ranks, json.dumps(arguments))
    assert status == 0, err
    assert "Traceback" not in err
    [line] = out.splitlines()
    assert json.loads(line) == {
        "doubles": [2 * x for x in range(20)],
        "ordered": [2 * x for x in range(100)],
        "unordered": [2 * x for x in range(100)],
        "gradient": 7.0,
        "chain": True,
        "pmap": [[5.0, 5.0], [4.0, 8.0]] if workers else [[1.0], [2.0]],
        "ranks": list(range(1, workers + 1)) or [0],
        "sizes": [1 + workers],
        "pids": 1 + workers,
        "here": [0, 1 + workers],
    }


ENDS = """
    def forever():  # Python cannot end beside this without a crash
        x = torch.ones(500, 500)
        while True:
            x = x @ x / 500

    if tg.main(__name__):
        how = sys.argv[1]
        print("on rank", tg.rank())
        if how == "raises":
            raise ValueError("that is how it ends")
        if how == "exits":
            client = distributed.get_client()
            client.retire_workers(names=[1])  # a rank that is no worker any more
            tasks = [client.submit(forever, pure=False) for _ in range(2)]
            time.sleep(0.5)
            sys.exit(3)
"""


def test_a_heartbeat_that_finds_no_scheduler_prints_no_traceback():
    said = re.findall(r'logger\.exception\("(.*?)"\)', inspect.getsource(Worker.heartbeat))
    assert said  # else Dask has changed it
    for sentence in said:
        record = logging.makeLogRecord({"msg": sentence})
        assert not _no_failed_heartbeats(record), sentence
    assert _no_failed_heartbeats(logging.makeLogRecord({"msg": "something else"}))


@pytest.mark.long
@pytest.mark.parametrize(("how", "expected"), [("exits", 3), ("raises", 1)])
def test_the_exit_status_is_that_of_rank_0(script, how, expected):
    status, out, err = run(script(ENDS), 3, how)
    assert status == expected, err
    assert out.count("on rank 0\n") == 1
    assert err.count("Traceback") == err.count("that is how it ends\n") == (how == "raises")


BUSY = """
    def forever(_):
        while True:
            pass

    if tg.main(__name__):
        tasks = distributed.get_client().map(forever, range(2))
        time.sleep(0.5)
        print("ready", flush=True)
        time.sleep(100)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("who", "how", "options"),
    [
        ("mpirun", signal.SIGINT, ()),
        ("rank 0", signal.SIGKILL, ("-disable-auto-cleanup",)),  # else mpirun kills the others
        ("mpirun", signal.SIGTERM, ()),
    ],
)
def test_no_process_survives_a_kill(script, who, how, options):
    with job(script(BUSY), 3, options=options) as started:
        started.wait_for("ready")
        assert len(started.alive()) >= 3
        (started.rank(0) if who == "rank 0" else started.process).send_signal(how)
        assert started.gone_within(15), started.alive()
        assert started.process.wait(1) != 0


def test_rank_0_ends_when_its_launcher_is_gone(script):
    text = """
    from taskgrad.launch.coordinator import _end_with
    if os.fork():
        print("ready", flush=True)
        time.sleep(100)
    _end_with(os.getppid())
    """
    with job(script(text), None) as started:
        started.wait_for("ready")
        started.process.kill()
        assert started.gone_within(10), started.alive()


ABSENT = """
    if {absent}:
        time.sleep(100)
    tg.main(__name__)
    """


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (
            "__import__('mpi4py.MPI').MPI.COMM_WORLD.Get_rank() == 2",
            "rank 2 of 3 did not come to tg.main within 2 s",
        ),
        # MPI itself waits for this one: who is left to say so is a watch on the C stack.
        *long_rows(
            ("os.environ['PMI_RANK'] == '2'", "_mpi_starts_when_every_rank_has_called_tg_main")
        ),
    ],
)
def test_a_rank_that_does_not_come_ends_the_job(script, absent, message):
    path = script(ABSENT.format(absent=absent))
    status, _, err = run(path, 3, env={"DASK_TASKGRAD__START_DEADLINE": "2s"})
    assert status != 0
    assert message in err


@pytest.mark.long
def test_a_start_that_fails_sends_the_other_ranks_home(script):
    status, _, err = run(script("tg.main(__name__, interface='no-such0')"), 3)
    assert status == 1
    assert "no-such0" in err
    assert err.count("Traceback (most recent call last)") == err.count("The above exception") + 1


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "2 processes were started, but MPI knows of 1"),
        *long_rows(("sys.modules['mpi4py'] = None", "pip install 'taskgrad[mpi]'")),
    ],
)
def test_an_mpi_that_is_not_the_launchers_is_an_error(script, before, message):
    launcher = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    status, _, err = run(script(f"{before}\ntg.main(__name__)"), None, env=launcher)
    assert status == 1
    assert message in err


@pytest.mark.long
def test_a_second_call_keeps_the_cluster_if_it_can(script):
    text = """
    assert (tg.rank(), tg.size()) == (0, 1)
    assert tg.main(__name__, workers=0)
    first = distributed.get_client()
    assert tg.main(__name__, workers=0)
    assert distributed.get_client() is first
    assert tg.main(__name__, workers=0, threads=2)
    second = distributed.get_client()
    assert first.status == "closed"
    second.close()
    assert tg.main(__name__, workers=0, threads=2)
    assert list(tg.imap(str, [None])) == ["None"]
    """
    status, _, err = run(script(text), None)
    assert status == 0, err


@pytest.mark.usefixtures("client")
def test_ranks_of_a_cluster_that_main_did_not_start():
    found = list(tg.imap(_rank_and_size, range(8), chunksize=1))
    assert {size for _, size in found} == {tg.size()} == {3}
    assert {rank for rank, _ in found} == {1, 2}
    assert tg.rank() == 0


def _rank_and_size(_: int) -> tuple[int, int]:
    time.sleep(0.05)
    return tg.rank(), tg.size()


def test_a_file_that_is_imported_is_not_the_program():
    assert tg.main("some_module") is False
    assert tg.main("__mp_main__") is False
    assert not tg.main(__name__)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": None}, TypeError),
        ({"workers": -1}, ValueError),
        ({"workers": True}, ValueError),
        ({"threads": 0}, ValueError),
        ({"interface": 3}, TypeError),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, error):
    with pytest.raises(error):
        tg.main(**{"name": "__main__", **arguments})
