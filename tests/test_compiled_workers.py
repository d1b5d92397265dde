"""Workers between compiled steps, at an error, beside other work, and when the client closes."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import distributed
import pytest
import torch
import torch.nn.functional as F
from dask.utils import key_split
from distributed import Client, get_worker
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import long
from plain import ConvNet, PlainTrainer, assert_same_training, images
from taskgrad.cluster import program_host, program_hosts
from taskgrad.cluster.worker_plugin import store_of
from test_compiled import before_a_trainer, threads_and_ports

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))


def rows(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(steps)]


class Waits(nn.Module):
    """Waits in its forward while its worker's store says so."""

    def forward(self, x):
        store = store_of(get_worker())
        while getattr(store, "wait_in_test", False):
            time.sleep(0.01)
        return x


def set_wait(wait: bool, dask_worker) -> None:
    store_of(dask_worker).wait_in_test = wait


def steps_there(dask_worker) -> int:
    """Steps that programs of this worker have inputs of, and did not begin."""
    hosts = program_hosts._hosts[dask_worker].named.values()
    return sum(len(host.resident._steps) for host in hosts)


def test_the_next_step_is_there_before_this_one_ends(client):
    model = net()
    model[3] = nn.Sequential(Waits(), model[3])
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, executor="compiled")
    [first, second] = rows(2)
    trainer.step(*first).item()
    client.run(set_wait, True)
    try:
        losses = [trainer.step(*first), trainer.step(*second)]
        assert wait_until(lambda: set(client.run(steps_there).values()) == {1}, 10)
        assert not any(loss.done for loss in losses)
    finally:
        client.run(set_wait, False)
    assert [loss.item() > 0 for loss in losses] == [True, True]


@pytest.mark.parametrize("clip_norm", [None, math.inf])
def test_a_worker_begins_the_next_step_while_another_is_at_this_one(client, clip_norm):
    """It needs the cotangents of the other, not its update; clipping needs the norms of all."""
    first, *others = nn.Linear(256, 256), nn.Linear(256, 1024), nn.Linear(1024, 1024)
    model = nn.Sequential(first, *others, nn.Linear(1024, 1))
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 1, 1])
    options = {"microbatches": 4, "schedule": "zb_h1", "clip_norm": clip_norm}
    trainer = tg.Trainer(chain, F.mse_loss, SGD, executor="compiled", **options)
    assert trainer.plan.flush is (clip_norm is not None)
    assert ("updates after a flush" in str(trainer.plan)) is (clip_norm is not None)
    x, y = torch.randn(256, 256), torch.randn(256, 1)
    with distributed.get_task_stream(client=client) as stream:
        for _ in range(7):
            trainer.step(x, y)
        trainer.wait()
        assert wait_until(lambda: not any(client.processing().values()))
        time.sleep(0.2)
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in stream.data:
        kind = key_split(row["key"]).partition(":")[0]
        [span] = row["startstops"]
        spans.setdefault((row["worker"], kind), []).append((span["start"], span["stop"]))
    near, far = (chain.placement[i].worker for i in (0, 3))
    assert len(spans[far, "weights"]) == 7 * 4
    forwards = sorted(spans[near, "forward"])[::4]  # the first one of each step
    weights = sorted(spans[far, "weights"])[3::4]  # the last one, which its update comes after
    early = [
        begins < ends for (begins, _), (_, ends) in zip(forwards[1:], weights[:-1], strict=True)
    ]
    assert any(early) is (clip_norm is None)


class Fails(nn.Module):
    """Raises in the third microbatch, with the time, if its worker's store says so."""

    def forward(self, x):
        store = store_of(get_worker())
        if getattr(store, "fail_in_test", 0):
            store.fail_in_test -= 1
            if not store.fail_in_test:
                raise ArithmeticError(str(time.time()))
        return x


def set_fail(count: int, dask_worker) -> None:
    store_of(dask_worker).fail_in_test = count


@pytest.mark.parametrize("schedule", ["zb_h2", *long("gpipe", "1f1b", "zb_h1")])
@pytest.mark.parametrize("at", [2, *long(0, 3)])
def test_an_error_is_known_within_a_second_and_nobody_waits_on(four, at, schedule):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    parts = [nn.Sequential(layers[i], Fails()) if i == at else layers[i] for i in range(4)]
    placement = [i for i in range(4) for _ in range(1 + (i == at))]
    chain = tg.GraphChain(nn.Sequential(*parts), client=four, placement=placement)
    options = {"microbatches": 8, "schedule": schedule, "executor": "compiled"}
    trainer = tg.Trainer(chain, F.mse_loss, SGD, **options)
    plain = PlainTrainer(nn.Sequential(*layers), F.mse_loss, SGD, microbatches=8)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    worker = next(row.worker for row in chain.placement if row.layer.startswith(f"{at}.1"))
    losses = [trainer.step(x, y).item()]
    four.run(set_fail, 3, workers=[worker])
    with pytest.raises(tg.LayerError) as raised:
        trainer.step(x, y).item()
    assert time.time() - float(str(raised.value.__cause__)) < 1
    message = str(raised.value)
    assert f"'{at}.1'" in message
    assert "microbatch 2 of step 1" in message
    assert worker in message
    assert wait_until(lambda: not any(four.processing().values()), 2)
    assert wait_until(lambda: total_held(four)["tapes"] == 0, 2)
    losses += [trainer.step(x, y).item() for _ in range(2)]
    assert losses == plain.train([(x, y)] * 3)


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square()


@pytest.mark.parametrize("steps", [6, *long(60)])
def test_trainers_in_threads_beside_other_work(four, steps):
    """Two trainers of other schedules, Dask tasks and a differentiable map, all at once."""
    made = []
    for name, options in [
        ("interleaved_1f1b", {"stages_per_worker": 2}),
        ("zb_v", {"placement": "v"}),
    ]:
        chain = tg.GraphChain(ConvNet(), client=four, **options)
        options = {"microbatches": 4, "schedule": name, "executor": "compiled"}
        made.append(tg.Trainer(chain, F.cross_entropy, ADAMW, **options))
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4)
    batches = images(steps)
    done = threading.Event()

    def train(trainer: tg.Trainer) -> list[float]:
        return [loss.item() for loss in [trainer.step(x, y) for x, y in batches]]

    def tasks() -> int:
        count = 0
        while not done.is_set() or count < 10:
            futures = four.map(math.sqrt, range(20), pure=False)
            assert sum(four.gather(futures)) == sum(map(math.sqrt, range(20)))
            count += 1
        return count

    def maps() -> torch.Tensor:
        x = torch.arange(10.0, requires_grad=True)
        for _ in range(3):
            torch.stack(list(tg.map(square, list(x), client=four))).sum().backward()
        return x.grad

    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(tasks)
        mapped = pool.submit(maps)
        losses = [f.result(timeout=120) for f in [pool.submit(train, t) for t in made]]
        done.set()
        assert beside.result(timeout=60) >= 10
        assert torch.equal(mapped.result(timeout=60), 6 * torch.arange(10.0))
    assert losses == [plain.train(batches)] * 2
    for trainer in made:
        assert_same_training(trainer.chain, plain, four)


@pytest.mark.parametrize("at", ["a step", *long("rest")])
def test_nothing_is_left_when_the_client_closes(client, at):
    before = before_a_trainer(client)
    model = net()
    model[3] = nn.Sequential(Waits(), model[3])
    with Client(client.scheduler.address, set_as_default=False) as other:
        chain = tg.GraphChain(model, client=other, placement=[0, 0, 1, 1, 1])
        trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, executor="compiled")
        [(x, y)] = rows(1)
        trainer.step(x, y).item()
        assert client.run(threads_and_ports) != before
        if at == "a step":
            client.run(set_wait, True)
            trainer.step(x, y)
    client.run(set_wait, False)
    assert wait_until(lambda: client.run(threads_and_ports) == before)
    assert wait_until(lambda: not any(total_held(client).values()))
    assert wait_until(lambda: not any(client.processing().values()))
    with pytest.raises(tg.TaskgradError, match="closed"):
        trainer.step(x, y)


class Packs(nn.Module):
    """Makes what is no tensor, and tensors without gradients, of another structure by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        h = self.inner(x)
        long_one = x.shape[1] > 3
        return {
            "h": h,
            "mask": x > 0,
            "lengths": torch.full((len(x),), x.shape[1]),
            "number": x.shape[1],
            "name": "long" if long_one else "short",
            "nothing": None if long_one else h.detach(),
            "pair": (h * 2, [x.mean()] * x.shape[1]),
        }


class Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, given):
        return {**given, "h": given["h"] * self.weight}


class Unpacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, given):
        h = torch.where(given["mask"], given["h"], given["pair"][0])
        assert (given["nothing"] is None) is (given["name"] == "long")
        assert given["lengths"].tolist() == [given["number"]] * len(h)
        h = h + sum(given["pair"][1]) / given["number"]
        return self.inner(h).mean(1)


@pytest.mark.parametrize("schedule", ["zb_h2", *long("gpipe", "1f1b", "zb_h1")])
def test_values_of_any_kind_whose_shapes_change(four, schedule):
    """They pass through a worker that only hands them on, and from each step to the next differ."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Packs(), Passes(), Unpacks())

    chain = tg.GraphChain(make(), client=four, placement=[0, 1, 2])
    options = {"microbatches": 3, "schedule": schedule, "executor": "compiled"}
    trainer = tg.Trainer(chain, F.mse_loss, ADAMW, **options)
    plain = PlainTrainer(make(), F.mse_loss, ADAMW, microbatches=3)
    torch.manual_seed(2)
    sizes = [(6, 2), (3, 5), (300, 3), (4, 400), (3, 1), (5, 4)] * 2
    batches = [(torch.randn(n, length, 4), torch.randn(n, 1)) for n, length in sizes]
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(chain, plain, four)


def delay_steps(seconds: float, dask_worker) -> None:
    """Have the messages that bring steps arrive later; 0 ends that."""
    kind = program_host.ProgramHost
    kind.prompt = getattr(kind, "prompt", kind._step)

    def delayed(self, **message):
        threading.Timer(seconds, kind.prompt, [self], message).start()

    kind._step = delayed if seconds else kind.prompt


def test_a_step_that_arrives_after_its_task_has_ended(client):
    """The task waits for a quarter of a second; then another one takes the step."""
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, torch.optim.SGD, microbatches=2)
    given = rows(3)
    losses = []
    client.run(delay_steps, 0.6)
    try:
        for x, y in given:
            losses.append(trainer.step(x, y).item())
            trainer.wait()
    finally:
        client.run(delay_steps, 0.0)
    plain = PlainTrainer(net(), F.mse_loss, torch.optim.SGD, microbatches=2)
    assert losses == plain.train(given)
