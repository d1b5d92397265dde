"""Batch norm in replicas of a pipeline, and layers that replicas refuse."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from distributed.security import Security
from torch import nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from helpers import long, long_rows
from taskgrad.cluster.worker_plugin import store_of

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STAGES = [0] * 5 + [1] * 6
# Of float64, over a few steps: sums are taken in another order.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture(scope="module")
def four() -> Iterator[Client]:
    """Four worker processes of one thread."""
    client = tg.local_cluster(n_workers=4, dashboard_address=":0")
    yield client
    client.close()


def norms() -> nn.Sequential:
    """Batch norms with all options; takes (n, 2, 4, 4) of float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)), nn.ReLU()),
        *(nn.Unflatten(1, (2, 2)), nn.BatchNorm3d(2, momentum=None), nn.Flatten()),
        *(nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 3)),
    )
    return model.double()


def batches(steps: int, size: int = 23) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = [torch.randn(size, 2, 4, 4, dtype=torch.float64) * 2 + 5 for _ in range(steps)]
    return [(x, torch.randint(3, (size,))) for x in inputs]


def plain_training(
    model: nn.Module,
    data: list[Any],
    replicas: int,
    microbatches: int,
    forward: Callable[..., Any] | None = None,
    shares: Callable[..., list[float]] | None = None,
) -> list[float]:
    """The losses of plain torch, which takes the microbatches of a turn as one batch."""
    optimizer = SGD(model.parameters())
    forward = forward or (lambda x, step, turn: model(x))
    losses = []
    for step, (x, y) in enumerate(data):
        xs, ys = x.tensor_split(microbatches), y.tensor_split(microbatches)
        weights = shares(ys) if shares else [len(part) / len(x) for part in xs]
        total = 0.0
        for start in range(0, microbatches, replicas):
            turn = range(start, min(start + replicas, microbatches))
            output = forward(torch.cat([xs[m] for m in turn]), step, turn)
            outputs = output.split([len(xs[m]) for m in turn])
            loss = sum(
                F.cross_entropy(out, ys[m]) * weights[m]
                for out, m in zip(outputs, turn, strict=True)
            )
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same_state(chain: tg.GraphChain, plain: nn.Module) -> None:
    ours, theirs = chain.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=name)


def check(
    client: Client,
    *,
    replicas: int,
    microbatches: int,
    placement: list[int],
    model: Callable[[], nn.Module] = norms,
    **options: Any,
) -> tg.Trainer:
    chain = tg.GraphChain(model(), client=client, placement=placement)
    trainer = tg.Trainer(
        chain,
        F.cross_entropy,
        SGD,
        microbatches=microbatches,
        replicas=replicas,
        sync_batch_norm=True,
        **options,
    )
    data, plain = batches(3), model()
    losses = [trainer.step(x, y).item() for x, y in data]
    expected = plain_training(plain, data, replicas, microbatches)
    torch.testing.assert_close(losses, expected, **CLOSE)
    assert_same_state(chain, plain)
    return trainer


@pytest.mark.parametrize(
    ("replicas", "microbatches", "placement"),
    [
        (2, 5, STAGES),
        (3, 5, [0] * 11),
        *long_rows((2, 2, STAGES), (2, 3, [0] * 11), (3, 7, [0] * 11), (4, 6, [0] * 11)),
    ],
)
def test_synchronised_as_one_batch(four, executor, replicas, microbatches, placement):
    check(four, replicas=replicas, microbatches=microbatches, placement=placement)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "placement"),
    [
        ("zb_h2", 7, STAGES),
        # By itself the order of three microbatches would not be a part of that of four.
        ("interleaved_1f1b", 7, [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]),
        *long_rows(
            ("gpipe", 5, STAGES),
            ("zb_h1", 9, STAGES),
            ("zb_v", 5, [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),
            ("auto", 5, STAGES),
        ),
    ],
)
def test_schedules(four, schedule, microbatches, placement):
    check(four, replicas=2, microbatches=microbatches, placement=placement, schedule=schedule)


@pytest.mark.parametrize("checkpoint", ["always", "except_last"])
def test_activation_checkpointing(four, executor, checkpoint):
    check(four, replicas=2, microbatches=4, placement=STAGES, checkpoint=checkpoint)


@pytest.mark.parametrize("shard_optimizer", [True])
def test_with_a_part_of_the_optimizer_on_each(four, shard_optimizer):
    check(four, replicas=2, microbatches=3, placement=STAGES, shard_optimizer=shard_optimizer)


class Residual(nn.Module):
    """A forward that is followed: its stages are parts of a graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)
        self.double()

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x + self.again(self.second(x))
        return self.head(x.flatten(1))


@pytest.mark.parametrize("checkpoint", ["never", *long("always")])
def test_stages_of_a_graph(four, checkpoint):
    options = {"model": Residual, "checkpoint": checkpoint}
    check(four, replicas=2, microbatches=5, placement=[0, 0, 0, 1, 1], **options)


def test_random_layers_draw_from_the_stream_of_their_microbatch(four):
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    data = [(x, y)] * 2

    def forward(x: torch.Tensor, step: int, turn: range) -> torch.Tensor:
        parts = []
        for m, part in zip(turn, plain[0](x).split(2), strict=True):
            with tg.random_stream(0, step, m, "1"):
                parts.append(plain[1](part))
        return plain[3](plain[2](torch.cat(parts)))

    chain = tg.GraphChain(model, client=four, placement=[0, 0, 0, 1])
    options = {"microbatches": 4, "replicas": 2, "sync_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    losses = [trainer.step(*batch).item() for batch in data]
    torch.testing.assert_close(losses, plain_training(plain, data, 2, 4, forward), **CLOSE)
    assert_same_state(chain, plain)


def test_microbatches_that_count_for_nothing(four):
    """Their samples are normalized with the others', and take part in the exchanges."""

    def weight(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((y > 0).sum()) if len(y) == 2 else 0.0

    def shares(ys: list[torch.Tensor]) -> list[float]:
        found = [weight(None, y) for y in ys]
        return [w / sum(found) for w in found]

    chain = tg.GraphChain(norms(), client=four, placement=STAGES)
    options = {"microbatches": 4, "replicas": 2, "sync_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, loss_weight=weight, **options)
    data, plain = batches(3, size=10), norms()
    losses = [trainer.step(x, y).item() for x, y in data]
    torch.testing.assert_close(losses, plain_training(plain, data, 2, 4, None, shares), **CLOSE)
    assert_same_state(chain, plain)


def test_mixed_precision(four):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    plain = copy.deepcopy(model)
    data = [(x.float(), y) for x, y in batches(3, size=8)]

    def forward(x: torch.Tensor, *_: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x)

    chain = tg.GraphChain(model, client=four, placement=[0, 0, 1, 1])
    options = {"microbatches": 4, "replicas": 2, "sync_batch_norm": True, "amp": "bf16"}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    losses = [trainer.step(x, y).item() for x, y in data]
    torch.testing.assert_close(
        losses, plain_training(plain, data, 2, 4, forward), rtol=0.02, atol=0
    )
    ours = chain.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.01, msg=name)


def test_evaluation_is_that_of_one_process(four):
    trainer = check(four, replicas=2, microbatches=3, placement=STAGES)
    plain = norms()
    plain.load_state_dict(trainer.chain.state_dict())
    x, y = batches(1)[0]
    with torch.no_grad():
        expected = F.cross_entropy(plain.eval()(x), y).item()
    assert trainer.evaluate([(x, y)])["loss"] == pytest.approx(expected, rel=1e-12)


class Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return checkpoint(self.norm, x, use_reentrant=False)


def test_a_layer_that_runs_its_norm_again_is_refused(four):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Recomputing(), nn.Flatten())
    chain = tg.GraphChain(model, client=four, placement=[0, 0, 0])
    options = {"microbatches": 2, "replicas": 2, "sync_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    with pytest.raises(tg.LayerError, match="option checkpoint="):
        trainer.step(torch.randn(4, 2, 4, 4), torch.randint(3, (4,))).item()


class Trap(nn.Module):
    """Does something once, where it was told so."""

    action = ""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4, dtype=torch.float64)

    def forward(self, x):
        action, Trap.action = Trap.action, ""
        if action == "raise":
            raise ArithmeticError("sprung")
        if action == "sleep":
            time.sleep(1.0)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "skip":
            return x
        return self.norm(x)


def set_trap(action: str) -> None:
    Trap.action = action


def with_trap() -> nn.Module:
    model = norms()
    model[3][1] = Trap()
    return model


@pytest.mark.parametrize(("action", "error"), [("raise", "sprung"), ("skip", "different")])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_failed_step_is_taken_again(four, executor, replica, action, error):
    """No rank waits for one that failed; messages of the failed step are not taken for others."""
    chain = tg.GraphChain(with_trap(), client=four, placement=[0] * 3 + [1] * 8)
    options = {"microbatches": 4, "replicas": 2, "sync_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    trap_at = trainer.plan.workers[2 * replica + 1].address
    data, plain = batches(3), with_trap()
    losses = []
    for i, (x, y) in enumerate(data):
        if i == 1:
            four.run(set_trap, action, workers=[trap_at])
            with pytest.raises(tg.TaskgradError, match=error):
                trainer.step(x, y).item()
        losses.append(trainer.step(x, y).item())
    torch.testing.assert_close(losses, plain_training(plain, data, 2, 4), **CLOSE)
    assert_same_state(chain, plain)


@pytest.mark.parametrize("steps", [3, *long(40)])
def test_faults_change_no_number(four, executor, steps):
    """Layers raise, skip their norms, the driver is interrupted; then as many steps without."""
    rng = random.Random(0)

    def make() -> tg.Trainer:
        chain = tg.GraphChain(with_trap(), client=four, placement=[0] * 3 + [1] * 8)
        options = {"microbatches": 5, "replicas": 2, "sync_batch_norm": True}
        return tg.Trainer(chain, F.cross_entropy, SGD, **options)

    trainer, other, data = make(), make(), batches(2 * steps)
    expected = [other.step(x, y).item() for x, y in data]
    traps = [trainer.plan.workers[i].address for i in (1, 3)]
    faults = ["sleep", "raise", "skip", *rng.choices(["sleep", "raise", "skip"], k=steps)]
    for at, (x, y) in enumerate(data):
        if at < steps:
            fault = faults[at]
            four.run(set_trap, fault, workers=[rng.choice(traps)])
            error = KeyboardInterrupt if fault == "sleep" else tg.TaskgradError
            timer = threading.Timer(rng.uniform(0.1, 0.6), signal.raise_signal, [signal.SIGINT])
            with pytest.raises(error):  # noqa: PT012
                if error is KeyboardInterrupt:
                    timer.start()
                trainer.step(x, y).item()
                time.sleep(2)
            four.run(set_trap, "", workers=traps)
            trainer.wait()  # the step was made, or it was not
        while trainer.steps <= at:
            assert trainer.step(x, y).item() == expected[at]
    ours, theirs = trainer.chain.state_dict(), other.chain.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_worker_is_lost_while_others_wait_for_it(fresh, executor):
    client = fresh(n_workers=2)
    chain = tg.GraphChain(with_trap(), client=client, placement=[0] * 11)
    options = {"microbatches": 2, "replicas": 2, "sync_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    x, y = batches(1)[0]
    trainer.step(x, y).item()
    lost = trainer.plan.workers[1].address
    client.run(set_trap, "kill", workers=[lost])
    with pytest.raises(tg.WorkerLostError, match=lost):
        trainer.step(x, y).item()


@pytest.mark.long
def test_over_tls():
    """Values go over Dask's own connections there."""
    options = {"protocol": "tls://", "security": Security.temporary(), "dashboard_address": ":0"}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,
        Client(cluster) as client,
    ):
        check(client, replicas=2, microbatches=5, placement=[0] * 11)


def test_what_cannot_be_synchronised_is_refused(four):
    chain = tg.GraphChain(norms(), client=four, placement=STAGES)
    make = partial(tg.Trainer, chain, F.cross_entropy, SGD, microbatches=2, sync_batch_norm=True)
    with pytest.raises(ValueError, match="give replicas="):
        make()
    with pytest.raises(ValueError, match=r"torch\.compile"):
        make(replicas=2, compile=True)
    with pytest.raises(ValueError, match="contradict each other"):
        make(replicas=2, deferred_batch_norm=True)
    with pytest.raises(TypeError, match="sync_batch_norm"):
        tg.Trainer(chain, F.cross_entropy, SGD, sync_batch_norm="yes")


@pytest.mark.parametrize(
    ("replicas", "placement", "options"),
    [
        (2, STAGES, {}),
        (3, [0] * 11, {"checkpoint": "always", "clip_norm": 0.1}),
        *long_rows((2, STAGES, {"schedule": "zb_h2", "shard_optimizer": True})),
    ],
)
def test_deferred_statistics_are_those_of_one_replica(four, executor, replicas, placement, options):
    """Bit for bit; also where a replica has no microbatch."""
    data = [*batches(2), *batches(1, size=2), *batches(2)]
    states, losses = [], []
    for count in (1, replicas):
        own = {**options, "replicas": count}
        if count == 1:
            own.pop("shard_optimizer", None)
        chain = tg.GraphChain(without_flat(), client=four, placement=placement)
        trainer = tg.Trainer(
            chain, F.cross_entropy, SGD, microbatches=5, deferred_batch_norm=True, **own
        )
        losses.append([trainer.step(x, y).item() for x, y in data])
        states.append(chain.state_dict())
    assert losses[0] == losses[1]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert states[0]["1.num_batches_tracked"] == len(data)
    found = four.run(buffers_on, {shard.token for shard in trainer.layout.shards})
    for named in found.values():
        for name, value in named.items():
            assert torch.equal(states[0][name], value), name


def without_flat() -> nn.Module:
    """Takes microbatches of one sample."""
    model = norms()
    model[8] = nn.Identity()
    return model


def buffers_on(tokens: set[str], dask_worker: Any) -> dict[str, torch.Tensor]:
    names = (
        {i: str(i) for i in range(3)} | {3: "3.0", 4: "3.1"} | {i: str(i - 1) for i in range(5, 11)}
    )
    return {
        f"{names[index]}.{name}": buffer.clone()
        for token, shard in store_of(dask_worker).entries().items()
        if token in tokens
        for index, layer in shard.layers.items()
        for name, buffer in layer.named_buffers()
    }


class FirstInput(nn.Module):
    """Takes its weight from the first input that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("made", torch.tensor(False))

    def forward(self, x):
        if not self.made:
            self.made.fill_(True)
            with torch.no_grad():
                self.weight.copy_(x[0])
        return x * self.weight


@pytest.mark.parametrize("checkpoint", ["never", *long("always")])
def test_a_layer_that_writes_a_parameter_is_refused(four, executor, checkpoint):
    model = nn.Sequential(FirstInput(), nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=four, placement=[0, 0])
    batch = torch.randn(4, 2), torch.randn(4, 2)
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, replicas=2, checkpoint=checkpoint)
    for _ in range(2):  # also once it writes no more
        with pytest.raises(tg.LayerError, match=r"parameter '0.weight'.*replicas=1"):
            trainer.step(*batch).item()
    tg.Trainer(chain, F.mse_loss, SGD, microbatches=2).step(*batch).item()


def test_embeddings_with_a_largest_norm_are_refused(four):
    layers = nn.Embedding(11, 2, max_norm=0.1), nn.Flatten(), nn.Linear(8, 2)
    chain = tg.GraphChain(nn.Sequential(*layers), client=four, placement=[0, 0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2, replicas=2)
    with pytest.raises(tg.LayerError, match="max_norm"):
        trainer.step(torch.randint(11, (4, 4)), torch.randn(4, 2)).item()
