"""Pins stay true when workers restart, join late or go away; nothing waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
import torch
from distributed import Client, Status, get_worker
from torch import nn

import taskgrad as tg
from conftest import wait_until
from helpers import long


def where(*_):
    return get_worker().name


def die_once(path):
    """Kills its worker process the first time."""
    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    return get_worker().name


def test_a_pin_survives_a_restart_by_the_nanny(fresh, tmp_path):
    client = fresh(n_workers=2)
    thunk = tg.spawn(die_once, str(tmp_path / "died"), worker=1)
    waiting = tg.spawn(where, thunk, worker=1)
    assert tg.collect([thunk, waiting]) == [1, 1]
    assert tg.collect(tg.spawn(where, worker=1)) == 1
    assert client is not None


def test_a_pin_made_before_a_restart_holds_after_it(fresh):
    client = fresh(n_workers=2)
    thunk = tg.spawn(where, worker=1)
    client.restart()
    assert tg.collect(thunk) == 1


def start_worker(client, name, folder):
    command = ["-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny"]
    return subprocess.Popen(
        [sys.executable, *command, "--name", name, "--local-directory", str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


@pytest.mark.long
def test_a_pin_survives_a_restart_by_hand(fresh, tmp_path):
    client = fresh(n_workers=0)
    first = start_worker(client, "alice", tmp_path)
    client.wait_for_workers(1, timeout=200)
    thunk = tg.spawn(where, worker="alice")
    first.terminate()
    first.wait(30)
    assert wait_until(lambda: not client.nthreads())
    found = []
    collecting = threading.Thread(target=lambda: found.append(tg.collect(thunk)))
    collecting.start()
    time.sleep(2.5)  # it waits for alice now, and has looked for her twice
    second = start_worker(client, "alice", tmp_path)
    collecting.join(60)
    second.terminate()
    second.wait(30)
    assert found == ["alice"]


def test_a_pin_to_a_worker_that_stays_away_fails_within_the_deadline(fresh):
    client = fresh(n_workers=2)
    thunk = tg.spawn(where, worker=1)
    address = thunk._node.worker
    client.retire_workers([address])
    # Which worker, which layer, what to do.
    expected = rf"worker 1 \({address}\) has been gone for 2 s, and 'forward:where'.*Start a worker"
    with (
        dask.config.set({"taskgrad.worker-deadline": "2s"}),
        pytest.raises(tg.WorkerLostError, match=expected),
    ):
        tg.collect(thunk)


def test_a_chain_whose_worker_was_restarted_says_so(fresh):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), client=client)
    assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)
    client.restart()
    for rows in (1, 1 << 18):  # the larger input is sent on its own
        with pytest.raises(tg.WorkerLostError, match="Make the chain again"):
            tg.collect(chain(torch.ones(rows, 2)))
    again = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    assert tg.collect(again(torch.ones(1, 2))).shape == (1, 2)


def kill(client, worker):
    os.kill(client.run(os.getpid)[worker], 9)


def close(client, worker):
    async def close(dask_worker):
        await dask_worker.close(executor_wait=False)

    client.run(close, workers=[worker], wait=False)


def remove(client, worker):
    async def remove(dask_scheduler):
        await dask_scheduler.remove_worker(worker, stimulus_id="test")

    client.run_on_scheduler(remove)


def freeze(client, worker):
    """It answers nothing any more; Dask notices by the heartbeats that do not come."""
    os.kill(client.run(os.getpid)[worker], signal.SIGSTOP)


@pytest.mark.parametrize("end", [kill, *long(close, remove, freeze)])
def test_a_worker_that_goes_while_it_computes(fresh, end):
    ttl = "30s" if end is freeze else None
    with dask.config.set({"distributed.scheduler.worker-ttl": ttl}):
        client = fresh(n_workers=2)

    def slow(x):
        time.sleep(30)
        return x

    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client, placement=[1])
    y = tg.spawn(slow, chain(torch.ones(1, 2)))
    y.persist()
    assert wait_until(lambda: any(client.processing().values()))
    end(client, chain.placement[0].worker)
    start = time.monotonic()
    with pytest.raises(tg.WorkerLostError, match="Make the chain again"):
        tg.collect(y)
    assert time.monotonic() - start < 200


def test_a_restarted_worker_never_goes_on_with_the_first_weights(fresh):
    """Dask runs lost tasks again, that which put the layers there among them."""
    client = fresh(n_workers=1)
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
    chain.load_state_dict({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)})
    os.kill(next(iter(client.run(os.getpid).values())), 9)
    for use in (lambda: tg.collect(chain(torch.ones(1, 2))), chain.state_dict):
        with pytest.raises(tg.WorkerLostError, match="Make the chain again"):
            use()


@pytest.mark.parametrize("rows", [1, *long(1 << 18)])  # the larger input is sent on its own
def test_a_paused_worker_is_not_waited_for_without_end(fresh, rows):
    client = fresh(n_workers=2, memory_limit=0)  # no monitor that would unpause it
    chain = tg.GraphChain(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), client=client, placement=[0, 1]
    )
    address = chain.placement[1].worker

    def pause(dask_worker):
        dask_worker.status = Status.paused

    client.run(pause, workers=[address])
    x = torch.ones(rows, 2)
    with (
        dask.config.set({"taskgrad.worker-deadline": "2s"}),
        pytest.raises(tg.WorkerLostError, match=rf"\({address}\) has been paused for 2 s.*memory"),
    ):
        tg.collect(tg.spawn(torch.add, x, chain(x), worker=1))


@pytest.mark.long
def test_a_scheduler_that_hangs_is_not_waited_for_without_end(tmp_path):
    file = tmp_path / "scheduler.json"
    command = ["-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    scheduler = subprocess.Popen([sys.executable, *command, "--scheduler-file", str(file)])
    try:
        assert wait_until(file.exists, 60)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            worker = start_worker(client, "alice", tmp_path)
            client.wait_for_workers(1, timeout=200)
            chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client)
            scheduler.send_signal(signal.SIGSTOP)
            with dask.config.set({"taskgrad.answer-deadline": "2s"}):
                for use in (
                    lambda: tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=client),
                    lambda: tg.collect(chain(torch.ones(1, 2))),
                    lambda: tg.collect(chain(torch.ones(1 << 18, 2))),
                ):
                    with pytest.raises(tg.TaskgradError, match="has not answered for 2 s"):
                        use()
            scheduler.send_signal(signal.SIGCONT)
            assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)
            worker.kill()
            worker.wait(30)
    finally:
        scheduler.kill()
        scheduler.wait(30)
