"""First mistakes end in one sentence, and first scripts end without a word."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from distributed import Client
from torch import nn

import taskgrad as tg
from helpers import long


def run_script(folder: Path, body: str, *, stdin: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a user's script, as a file or from standard input."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(body))
    with script.open() as source:
        return subprocess.run(
            [sys.executable, "-" if stdin else str(script)],
            stdin=source if stdin else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1])},
            check=False,
        )


WORK = "print('sum', tg.collect(tg.spawn(torch.add, torch.ones(2), 1)).sum().item())"


@pytest.mark.parametrize("start", ["client = tg.local_cluster(n_workers=1)", *long("")])
def test_a_script_without_a_guard_ends_in_a_sentence_that_names_it(tmp_path, start):
    done = run_script(tmp_path, f"import torch, taskgrad as tg\n{start}\n{WORK}")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) < 20
    assert lines[-1].startswith("taskgrad.errors.TaskgradError: this script has to begin its work")
    assert 'if __name__ == "__main__":' in lines[-1]
    assert not any("nanny" in line.lower() for line in lines)


@pytest.mark.long
def test_a_worker_process_of_others_that_reaches_the_work_says_so(tmp_path):
    """As those of a data loader do: what they import is not theirs to do."""
    done = run_script(
        tmp_path,
        f"""
        import multiprocessing, torch, taskgrad as tg
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=print)
            process.start()
            process.join()
        else:
            {WORK}
        """,
    )
    assert done.stderr.splitlines()[-1].startswith("taskgrad.errors.TaskgradError: this script")


def test_a_worker_process_that_dies_at_once_is_told_with_its_status(tmp_path):
    done = run_script(
        tmp_path,
        """
        import sys, taskgrad as tg
        if __name__ == "__main__":
            tg.local_cluster(n_workers=1)
        else:
            sys.exit(7)
        """,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) < 20
    assert "TaskgradError: a worker process ended with status 7 before" in done.stderr


@pytest.mark.long
def test_a_script_from_standard_input_works(tmp_path):
    body = f"import torch, taskgrad as tg\nclient = tg.local_cluster(n_workers=1)\n{WORK}"
    done = run_script(tmp_path, body, stdin=True)
    assert (done.returncode, done.stdout) == (0, "sum 4.0\n"), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("open_client", "end", "status"),
    [
        ("tg.local_cluster(n_workers=2)", "raise ValueError('the user')", 1),
        ("Client(LocalCluster(n_workers=2, threads_per_worker=1))", "sys.exit(3)", 3),
    ],
)
def test_a_script_that_does_not_close_its_client_ends_quietly(tmp_path, open_client, end, status):
    done = run_script(
        tmp_path,
        f"""
        import sys, torch, taskgrad as tg
        from distributed import Client, LocalCluster
        from torch import nn
        if __name__ == "__main__":
            client = {open_client}
            chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
            x = torch.ones(1, 2, requires_grad=True)
            y = chain(x)
            value = tg.collect(y)
            kept = tg.map(lambda a: x.sum() * a, [1.0, 2.0])
            never = chain(x)
            {end}
        """,
    )
    assert done.returncode == status
    told = [line for line in done.stderr.splitlines() if " - distributed." in line]
    assert [line for line in told if "still alive after" not in line] == []  # a slow machine
    assert "Traceback" not in done.stderr or end.startswith("raise")


def test_a_taken_dashboard_port_is_no_reason_to_warn():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", 8787))
            taken.listen()
        except OSError:
            pass  # somebody else has it
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            client = tg.local_cluster(n_workers=0)
        assert ":8787/" not in client.dashboard_link
        client.close()


def test_a_taken_scheduler_port_is_told_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(tg.TaskgradError, match="scheduler cannot have its port.*Give another"):
            tg.local_cluster(n_workers=0, scheduler_port=port, dashboard_address=":0")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("memory_limit", "1MB"),
        ("memory_limit", -1),
        ("memory_limit", "lots"),
        ("scheduler_port", 70000),
        ("scheduler_port", -1),
    ],
)
def test_a_value_that_no_cluster_can_start_with_is_refused(option, value):
    with pytest.raises(ValueError, match=r"memory_limit is|'lots'|scheduler_port"):
        tg.local_cluster(n_workers=1, dashboard_address=":0", **{option: value})


@pytest.mark.parametrize(
    "where", [{"host": "203.0.113.7"}, {"host": "no.such.invalid"}, {"dashboard_address": "no.x"}]
)
def test_a_host_that_is_not_this_machine_is_told_in_a_sentence(where):
    with pytest.raises(tg.TaskgradError, match="not an address of this machine"):
        tg.local_cluster(n_workers=0, **{"dashboard_address": ":0", **where})


def test_what_a_closed_client_leaves_says_so(client):
    own = Client(client.scheduler.address, set_as_default=False)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=own)
    y = chain(torch.ones(1, 2))
    value = tg.collect(y)
    own.close()
    for use in (
        y.compute,
        y.persist,
        y.item,
        chain.memory,
        chain.zero_grad,
        chain.to_module,
        lambda: tg.collect(y),
        lambda: tg.collect(chain(torch.ones(1, 2))),
        lambda: tg.spawn(torch.neg, y, worker=0),
        lambda: value.sum().backward(),
        lambda: tg.GraphChain(nn.Linear(2, 2), client=own),
        lambda: tg.map(abs, [1], client=own),
        lambda: tg.imap(abs, [1], client=own),
        lambda: tg.starmap(abs, [(1,)], client=own),
        lambda: tg.pmap(abs, client=own)(torch.ones(1)),
    ):
        with pytest.raises(tg.TaskgradError, match="the Dask client is closed: .*Open a client"):
            use()
    assert repr(y).startswith("Thunk")


def test_a_forked_child_that_uses_its_parents_client_is_told(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    y = chain(torch.ones(1, 2))
    uses = (
        lambda: tg.collect(y),
        lambda: tg.collect(tg.spawn(torch.ones, 2)),
        lambda: tg.map(abs, [1]),
        lambda: list(tg.imap(abs, [1])),
        lambda: tg.pmap(abs)(torch.ones(1)),
        lambda: tg.GraphChain(nn.Linear(2, 2)),
        chain.to_module,
    )
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def child():
        for use in uses:
            try:
                there.send(repr(use()))
            except Exception as error:
                there.send(f"{type(error).__name__}: {error}")

    process = fork.Process(target=child)
    process.start()
    try:
        for _ in uses:
            assert here.poll(60)
            assert here.recv().startswith("TaskgradError: this process was forked from one with")
    finally:
        process.kill()
        process.join(30)
    assert tg.collect(y).shape == (1, 2)


def test_calls_inside_a_running_event_loop_give_their_values(client):
    async def main():
        return tg.collect(tg.spawn(torch.neg, torch.ones(2))), tg.map(abs, [-1, 2])

    value, mapped = asyncio.run(main())
    assert (value.tolist(), list(mapped)) == ([-1.0, -1.0], [1, 2])


def test_code_that_workers_do_not_have_is_named_with_what_to_do(client, tmp_path, monkeypatch):
    code = "class Net:\n    pass\n\ndef double(x):\n    return 2 * x"
    (tmp_path / "only_here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    for use in (
        lambda: tg.spawn(only_here.double, torch.ones(2)),
        lambda: tg.spawn(type, only_here.Net()),
        lambda: tg.GraphChain(nn.Sequential(nn.Identity()), client=client)([only_here.Net()]),
    ):
        with pytest.raises(tg.TaskgradError, match=r"only_here.*client.upload_file"):
            tg.collect(use())
    with pytest.raises(tg.TaskgradError, match=r"only_here.*client.upload_file"):
        tg.map(only_here.double, [1], client=client)
    with pytest.raises(tg.TaskgradError, match=r"only_here.*client.upload_file"):
        tg.map(type, [only_here.Net()], client=client)
