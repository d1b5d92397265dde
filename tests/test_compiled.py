"""Compiled steps: programs that stay on workers, what ends them, and what they leave behind."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import dask
import dask.array as da
import distributed
import psutil
import pytest
import torch
import torch.nn.functional as F
from dask.utils import key_split
from distributed import Client
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import end_rank_programs, long, long_rows
from plain import ConvNet, PlainTrainer, assert_same_training, images

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def trainer_on(client: Client, model: nn.Module, placement: list[int], **options) -> tg.Trainer:
    chain = tg.GraphChain(model, client=client, placement=placement)
    return tg.Trainer(chain, F.cross_entropy, ADAMW, executor="compiled", **options)


def placed(layers: int, workers: int, per_worker: int) -> list[int]:
    """Layers in runs of equal length: several stages a worker, round after round."""
    stages = workers * per_worker
    return [i * stages // layers % workers for i in range(layers)]


@pytest.mark.parametrize("microbatches", [4, *long(1, 3, 8)])
@pytest.mark.parametrize(("workers", "per_worker"), [(3, 2), *long_rows((1, 1), (2, 2), (4, 1))])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h2", *long("gpipe", "zb_h1", "zb_v")])
def test_same_bits_as_plain_torch(four, schedule, workers, per_worker, microbatches):
    model = ConvNet()
    placement = placed(len(model), workers, per_worker)
    options = {"microbatches": microbatches, "clip_norm": 0.5}
    trainer = trainer_on(four, model, placement, schedule=schedule, **options)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, **options)
    batches = images(20)
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(trainer.chain, plain, four)


def test_batches_of_other_sizes(client):
    model = ConvNet()
    trainer = trainer_on(client, model, placed(len(model), 2, 1), microbatches=3, accumulate=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=3, accumulate=2)
    batches = [(x[:n], y[:n]) for (x, y), n in zip(images(10), [10, 7, 3, 5, 4] * 2, strict=True)]
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(trainer.chain, plain, client)


def threads_and_ports(dask_worker) -> tuple[int, int]:
    """Threads of channels, and ports that anybody may connect to."""
    named = sum(t.name == "taskgrad-channels" for t in threading.enumerate())
    listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    return named, len(listening)


def before_a_trainer(client: Client) -> dict[str, tuple[int, int]]:
    """Threads and ports of the workers, once those of earlier trainers and maps are gone."""
    end_rank_programs(client)
    assert wait_until(
        lambda: all(named == 0 for named, _ in client.run(threads_and_ports).values())
    )
    return client.run(threads_and_ports)


def test_nothing_is_left_when_a_trainer_is_gone(client):
    before = before_a_trainer(client)
    model = ConvNet()
    trainer = trainer_on(client, model, placed(len(model), 2, 1), microbatches=2)
    trainer.step(*images(1)[0]).item()
    during = client.run(threads_and_ports)
    assert {a: (1, ports) for a, (_, ports) in before.items()} == during
    del trainer
    gc.collect()
    assert wait_until(lambda: client.run(threads_and_ports) == before)
    assert wait_until(lambda: not any(total_held(client).values()))
    assert wait_until(lambda: not any(client.processing().values()))


def test_other_work_runs_beside_a_trainer(client):
    """On workers with one thread: tasks, and a second trainer in another order of workers."""
    model = ConvNet()
    first = trainer_on(client, model, placed(len(model), 2, 1), microbatches=2)
    second = trainer_on(
        client, ConvNet(), [1 - w for w in placed(len(model), 2, 1)], microbatches=2
    )
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2)
    batches = images(12)
    losses: list[tuple[tg.Trainer, object]] = []
    for x, y in batches:
        losses += [(first, first.step(x, y)), (second, second.step(x, y))]
        assert client.submit(sum, (1, 2), pure=False).result(timeout=30) == 3
    expected = plain.train(batches)
    for trainer in (first, second):
        assert [loss.item() for t, loss in losses if t is trainer] == expected


def test_dask_knows_that_the_workers_are_busy(client):
    model = ConvNet()
    trainer = trainer_on(client, model, placed(len(model), 2, 1))
    for x, y in images(3):
        trainer.step(x, y).item()
    assert sorted(len(keys) for keys in client.processing().values()) == [1, 1]
    assert all(k.startswith("train") for keys in client.processing().values() for k in keys)
    assert wait_until(lambda: not any(client.processing().values()), 10)  # it is idle


class Trap(nn.Module):
    """Raises, sleeps or kills its process when its worker says so."""

    action = ""

    def forward(self, x):
        action, Trap.action = Trap.action, ""
        if action == "raise":
            raise ArithmeticError("sprung")
        if action == "sleep":
            time.sleep(1.0)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def set_trap(action: str) -> None:
    Trap.action = action


def trapped() -> nn.Sequential:
    model = ConvNet()
    model[6] = nn.Sequential(model[6], Trap())
    return model


@pytest.mark.parametrize("steps", [*long(100)])
def test_faults_change_no_bit(client, steps):
    """Layers raise, batches are bad, the driver is interrupted; then as many steps without."""
    rng = random.Random(0)
    model = trapped()
    trainer = trainer_on(client, model, [0] * 5 + [1] * 6, microbatches=3)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=3)
    batches = images(2 * steps)
    trap_at = trainer.chain.placement[7].worker
    expected = plain.train(batches)
    interrupted_at: list[float] = []

    def interrupt() -> None:
        interrupted_at.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    for at, (x, y) in enumerate(batches):
        fault = rng.choice(["", "raise", "bad", "interrupt"]) if at < steps else ""
        if fault == "bad":
            with pytest.raises(tg.LayerError, match="microbatch"):
                trainer.step(x[:, :1].repeat(1, 5, 1, 1), y).item()
        elif fault:
            client.run(set_trap, "raise" if fault == "raise" else "sleep", workers=[trap_at])
            error = tg.LayerError if fault == "raise" else KeyboardInterrupt
            timer = threading.Timer(rng.uniform(0.0, 0.5), interrupt)
            with pytest.raises(error):  # noqa: PT012
                if fault == "interrupt":
                    timer.start()
                trainer.step(x, y).item()
                time.sleep(2)
            assert fault == "raise" or time.monotonic() - interrupted_at[-1] < 2
            client.run(set_trap, "", workers=[trap_at])
        while trainer.steps <= at:
            loss = trainer.step(x, y).item()
            assert loss == expected[at]
    ours = {n.replace("6.0.", "6."): v for n, v in trainer.chain.state_dict().items()}
    assert all(torch.equal(ours[n], v) for n, v in plain.model.state_dict().items())
    assert wait_until(lambda: total_held(client)["tapes"] == 0)


@pytest.fixture
def lost_workers_come_back():
    """A LocalCluster ends the nanny of a worker that is not there 15 s after it was lost.

    It would also end that of one which is lost once more at that moment.
    """
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}):
        yield


@pytest.mark.timeout(900)  # most of it waits for workers that start again
@pytest.mark.usefixtures("lost_workers_come_back")
@pytest.mark.parametrize("kills", [2, *long(15)])
def test_a_worker_that_is_killed(fresh, kills):
    rng = random.Random(1)
    client = fresh(n_workers=3)
    x, y = images(1)[0]
    for _ in range(kills):
        client.wait_for_workers(3)
        model = ConvNet()
        trainer = trainer_on(client, model, placed(len(model), 3, 1), microbatches=3)
        trainer.step(x, y).item()
        victim = trainer.chain.placement[rng.choice([0, 5, len(model) - 1])].worker
        pid = client.run(os.getpid, workers=[victim])[victim]
        killer = threading.Timer(rng.uniform(0.0, 0.1), os.kill, [pid, signal.SIGKILL])
        killer.start()
        with pytest.raises(tg.WorkerLostError, match="is gone") as raised:  # noqa: PT012
            while True:
                loss = trainer.step(x, y)
                killed_at = time.monotonic() if not killer.is_alive() else None
                loss.item()
        assert victim in str(raised.value)
        if killed_at is not None:
            assert time.monotonic() - killed_at < 3
        del trainer, raised, loss
        gc.collect()
        assert wait_until(lambda: not any(total_held(client).values()))
        assert wait_until(lambda: not any(client.processing().values()))


def test_the_task_stream_shows_what_programs_did(client):
    model = ConvNet()
    trainer = trainer_on(client, model, placed(len(model), 2, 1), microbatches=3)
    with distributed.get_task_stream(client=client) as stream:
        for x, y in images(3):
            loss = trainer.step(x, y)
            loss.item()
        trainer.wait()
        assert wait_until(lambda: not any(client.processing().values()))
        time.sleep(0.2)
    shown = [row for row in stream.data if not row["key"].startswith("train")]
    workers = {row.worker for row in trainer.chain.placement}
    assert {row["worker"] for row in shown} == workers
    computed = [row for row in shown if row["startstops"][0]["action"] == "compute"]
    kinds = Counter(key_split(row["key"]).partition(":")[0] for row in computed)
    assert kinds["forward"] == kinds["backward"] == 3 * 2 * 3
    assert kinds["update"] == 3 * 2
    moved = {r["key"].split("-")[0] for r in shown if r["startstops"][0]["action"] == "transfer"}
    assert moved == {"send", "receive"}
    for worker in workers:
        times = sorted(
            (r["startstops"][0]["start"], r["startstops"][0]["stop"])
            for r in shown
            if r["worker"] == worker
        )
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(times))
    report = loss.report
    assert set(report["busy"]) == set(report["waiting"]) == workers
    assert all(seconds > 0 for seconds in report["busy"].values())


DRIVER = """
import functools, sys, torch, taskgrad as tg
from distributed import Client
from torch import nn
client = Client(sys.argv[1])
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
chain = tg.GraphChain(model, client=client, placement=[0, 0, 1, 1])
trainer = tg.Trainer(chain, nn.functional.mse_loss, torch.optim.SGD, microbatches=2)
while True:
    trainer.step(torch.ones(8, 64), torch.ones(8, 64)).item()
    print(trainer.steps, flush=True)
"""


def test_a_driver_that_is_killed(client):
    before = before_a_trainer(client)
    command = [sys.executable, "-c", DRIVER, client.scheduler.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        for line in driver.stdout:
            if int(line) == 20:
                break
        assert total_held(client)["shards"] == 2
        driver.kill()
    assert wait_until(lambda: client.run(threads_and_ports) == before)
    assert wait_until(lambda: not any(total_held(client).values()))
    assert wait_until(lambda: not any(client.processing().values()))


def test_a_batch_on_workers_is_taken_by_programs(client):
    model = ConvNet()
    trainer = trainer_on(client, model, placed(len(model), 2, 1), microbatches=3)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=3)
    batches = images(4)
    losses = []
    for x, y in batches:
        on_workers = (da.from_array(t.numpy(), chunks=(4, *t.shape[1:])) for t in (x, y))
        losses.append(trainer.step(*on_workers))
    assert all("waiting" in loss.report for loss in losses)
    assert [loss.item() for loss in losses] == plain.train(batches)


def test_a_batch_on_workers_that_several_take_is_taken_by_tasks(client, caplog):
    model = nn.Sequential(tg.Parallel(torch.add, nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0, 0])
    sgd = partial(torch.optim.SGD, lr=0.1)
    trainer = tg.Trainer(chain, F.mse_loss, sgd, microbatches=2)
    x, y = (da.ones(shape, dtype="float32", chunks=2) for shape in ((4, 4), (4, 1)))
    loss = trainer.step(x, y)
    assert loss.item() > 0
    assert "waiting" not in loss.report
    assert "several of them take the model's input" in caplog.text
