"""`tg.main`: one file under mpirun, on local processes, in one process; and how it ends."""

from __future__ import annotations

import json
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import taskgrad as tg
from mpi_jobs import job, run

HEAD = """\
import json, os, sys, time
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
        return 2 * x, tg.rank(), tg.size(), os.getpid()

    def chain_is_torch():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
        x = torch.randn(9, 5)
        y, back = tg.vjp(tg.GraphChain(model), x)
        grads, _ = back(torch.ones(9, 1))
        model(x).sum().backward()
        return all(torch.equal(tg.collect(grads[n]), p.grad) for n, p in model.named_parameters())

    if tg.main(__name__, **json.loads(sys.argv[1])):
        client = distributed.get_client()
        found = client.gather(client.map(double, range(20)))
        doubles, ranks, sizes, pids = map(list, zip(*found))
        print(json.dumps({
            "doubles": doubles, "ranks": sorted(set(ranks)), "sizes": sorted(set(sizes)),
            "processes": len({*pids, os.getpid()}), "here": [tg.rank(), tg.size()],
            "chain": chain_is_torch(),
        }))
"""


@pytest.mark.parametrize(
    ("ranks", "arguments", "workers"),
    [(3, {}, 2), (1, {}, 0), (None, {"workers": 2}, 2), (None, {"workers": 0}, 0)],
    ids=["mpirun -n 3", "mpirun -n 1", "local workers", "in this process"],
)
def test_one_file_runs_with_and_without_mpi(script, ranks, arguments, workers):
    status, out, err = run(script(WORK), ranks, json.dumps(arguments))
    assert status == 0, err
    assert "Traceback" not in err
    [line] = out.splitlines()
    found = json.loads(line)
    assert found["doubles"] == [2 * x for x in range(20)]
    assert set(found["ranks"]) <= (set(range(1, workers + 1)) or {0})
    assert found["sizes"] == [1 + workers]
    assert found["here"] == [0, 1 + workers]
    assert found["processes"] == 1 + len(set(found["ranks"]) - {0})
    assert found["chain"]


ENDS = """
    def forever():
        while True:
            time.sleep(0.1)

    if tg.main(__name__):
        how = sys.argv[1]
        print("on rank", tg.rank())
        if how == "raises":
            raise ValueError("that is how it ends")
        if how == "exits":
            tasks = [distributed.get_client().submit(forever, pure=False) for _ in range(4)]
            time.sleep(0.5)
            sys.exit(3)
"""


@pytest.mark.parametrize(("how", "expected"), [("raises", 1), ("exits", 3)])
def test_the_exit_status_is_that_of_rank_0(script, how, expected):
    status, out, err = run(script(ENDS), 3, how)
    assert status == expected, err
    assert out.count("on rank 0\n") == 1
    assert err.count("Traceback") == err.count("that is how it ends\n") == (how == "raises")


SLEEPS = """
    if tg.main(__name__):
        print("ready", flush=True)
        time.sleep(100)
"""


@pytest.mark.parametrize(
    ("who", "how", "options"),
    [
        ("rank 0", signal.SIGKILL, ()),
        ("rank 0", signal.SIGKILL, ("-disable-auto-cleanup",)),  # here mpirun leaves it to us
        ("mpirun", signal.SIGTERM, ()),
        ("mpirun", signal.SIGINT, ()),
    ],
)
def test_no_process_survives_a_kill(script, who, how, options):
    with job(script(SLEEPS), 3, options=options) as started:
        started.wait_for("ready")
        assert len(started.alive()) >= 3
        (started.rank(0) if who == "rank 0" else started.process).send_signal(how)
        assert started.gone_within(15), started.alive()
        assert started.process.wait(1) != 0


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
