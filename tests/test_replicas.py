"""Replicas of a pipeline: the same bits as one replica, whatever stages, schedule and options."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import dask.array as da
import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from torch.optim.lr_scheduler import StepLR

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import long, long_rows, reference
from plain import ConvNet, PlainTrainer, images, next_token, tokens, transformer
from taskgrad import replicated_layout
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.plan.plan import Plan

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SGD_PLAIN = partial(torch.optim.SGD, lr=0.1)
CUT = [0] * 5 + [1] * 5


@pytest.fixture(scope="module")
def four() -> Iterator[Client]:
    """Four worker processes of one thread."""
    client = tg.local_cluster(n_workers=4, dashboard_address=":0")
    yield client
    client.close()


def assert_equal_to(chain: tg.GraphChain, plain: PlainTrainer) -> None:
    """Parameters bit for bit; buffers are those of the first replica alone."""
    ours = chain.state_dict()
    for name, value in plain.model.named_parameters():
        assert torch.equal(ours[name], value), name


def check(
    client: Client,
    model: nn.Module,
    plain: nn.Module,
    batches: list[Any],
    *,
    placement: Any,
    loss: Any = F.cross_entropy,
    optimizer: Any = ADAMW,
    microbatches: int = 4,
    plain_options: dict[str, Any] | None = None,
    **options: Any,
) -> tg.Trainer:
    """Train with these options of a Trainer and plainly; returns the trainer."""
    expected = PlainTrainer(
        plain, loss, optimizer, microbatches=microbatches, **(plain_options or {})
    )
    chain = tg.GraphChain(model, client=client, placement=placement)
    trainer = tg.Trainer(chain, loss, optimizer, microbatches=microbatches, **options)
    assert [trainer.step(x, y).item() for x, y in batches] == expected.train(batches)
    assert_equal_to(chain, expected)
    return trainer


@pytest.mark.parametrize(
    ("replicas", "placement", "shard_optimizer"),
    [
        (2, [0] * 10, False),
        (2, CUT, True),
        (3, [0] * 10, True),
        *long_rows((2, [0] * 10, True), (2, CUT, False), (4, [0] * 10, True), (4, [0] * 10, False)),
    ],
)
def test_bits_of_one_replica(four, executor, replicas, placement, shard_optimizer):
    check(
        four,
        ConvNet(),
        ConvNet(),
        images(4),
        placement=placement,
        microbatches=5,
        replicas=replicas,
        shard_optimizer=shard_optimizer,
    )


@pytest.mark.parametrize("shard_optimizer", [True, *long(False)])
def test_tied_weights_over_stages_and_replicas(four, shard_optimizer):
    check(
        four,
        transformer(tied=True),
        transformer(tied=True),
        tokens(4),
        placement=[0, 0, 1, 1],
        loss=next_token,
        replicas=2,
        shard_optimizer=shard_optimizer,
    )


@pytest.mark.parametrize("schedule", ["gpipe", "zb_h2", *long("1f1b", "zb_h1", "auto")])
def test_every_schedule(four, schedule):
    check(
        four,
        ConvNet(),
        ConvNet(),
        images(3),
        placement=CUT,
        replicas=2,
        shard_optimizer=True,
        schedule=schedule,
        microbatches=6,
    )


@pytest.mark.parametrize(
    ("schedule", "placement"),
    [
        ("zb_v", [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]),
        *long_rows(("interleaved_1f1b", [0, 0, 0, 1, 1, 0, 0, 0, 1, 1])),
    ],
)
def test_schedules_with_several_stages_a_worker(four, schedule, placement):
    check(
        four,
        ConvNet(),
        ConvNet(),
        images(3),
        placement=placement,
        replicas=2,
        schedule=schedule,
        microbatches=8,
    )


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"clip_norm": 0.1}, {"clip_norm": 0.1}),
    "accumulate": ({"accumulate": 2}, {"accumulate": 2}),
    "bf16": ({"amp": "bf16"}, {"autocast": torch.bfloat16}),
    "scheduler": (
        {"lr_scheduler": partial(StepLR, step_size=2)},
        {"lr_scheduler": partial(StepLR, step_size=2)},
    ),
    "recompute": ({"checkpoint": "always"}, {}),
}


@pytest.mark.parametrize("shard_optimizer", [True, *long(False)])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_trainer(four, option, shard_optimizer):
    ours, theirs = OPTIONS[option]
    check(
        four,
        ConvNet(),
        ConvNet(),
        images(4),
        placement=CUT,
        replicas=2,
        shard_optimizer=shard_optimizer,
        plain_options=theirs,
        **ours,
    )


@pytest.mark.long
def test_fp16_with_a_scaler(four):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    scaler = torch.amp.GradScaler("cpu")
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
    batches[1][0][7] = 3e4  # overflows in one replica: all skip the update
    check(
        four,
        model,
        copy.deepcopy(model),
        batches,
        placement=[0, 0, 1],
        replicas=2,
        shard_optimizer=True,
        amp="fp16",
        plain_options={"scaler": scaler, "autocast": torch.float16},
    )


def test_a_batch_with_fewer_samples_than_microbatches(four):
    """Replicas without a microbatch still get the new parameters."""
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    batches = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (9, 1, 2, 9, 3, 1, 1)]
    expected = []
    optimizer = ADAMW(plain.parameters())
    for x, y in batches:
        count = min(4, len(x))
        total = 0.0
        for part, target in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
            loss = F.cross_entropy(plain(part), target)
            (loss * (len(part) / len(x))).backward()
            total = total + loss.detach() * (len(part) / len(x))
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(total))
    chain = tg.GraphChain(model, client=four, placement=[0, 0, 1])
    trainer = tg.Trainer(
        chain, F.cross_entropy, ADAMW, microbatches=4, replicas=2, shard_optimizer=True
    )
    assert [trainer.step(x, y).item() for x, y in batches] == expected
    for name, value in plain.named_parameters():
        assert torch.equal(chain.state_dict()[name], value)


def test_batches_on_the_workers(four, executor):
    model = ConvNet()
    chain = tg.GraphChain(model, client=four, placement=CUT)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4, replicas=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=4)
    batches = images(3)
    losses = []
    for x, y in batches:
        there = [da.from_array(t.numpy(), chunks=t.shape) for t in (x, y)]
        losses.append(trainer.step(*there).item())
    assert losses == plain.train(batches)
    assert_equal_to(chain, plain)


def test_optimizer_state_is_split(four):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    batch = torch.randn(8, 256), torch.randn(8, 256)

    def optimizer_bytes(shard_optimizer: bool) -> int:
        chain = tg.GraphChain(model, client=four, placement=[0] * 8)
        trainer = tg.Trainer(
            chain,
            F.mse_loss,
            ADAMW,
            microbatches=2,
            replicas=2,
            shard_optimizer=shard_optimizer,
        )
        trainer.step(*batch).item()
        rows = chain.memory()
        assert [row.parameters for row in rows] == [8 * 256 * 257 * 4] * 2
        return max(row.optimizer for row in rows)

    whole = optimizer_bytes(False)
    assert whole >= 2 * 8 * 256 * 257 * 4
    assert optimizer_bytes(True) <= 0.55 * whole


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, True, CUT), (1, False, [0] * 10)),
        *long_rows(
            ((1, False, CUT), (2, True, [0] * 10)),
            ((2, False, CUT), (2, True, CUT)),
            ((3, True, [0] * 10), (2, True, CUT)),
        ),
    ],
)
@pytest.mark.parametrize("accumulate", [1, *long(2)])
def test_a_checkpoint_is_restored_with_other_replicas(four, tmp_path, before, after, accumulate):
    def options(replicas: int, shard_optimizer: bool) -> dict[str, Any]:
        return {"replicas": replicas, "shard_optimizer": shard_optimizer}

    batches = images(6)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4, accumulate=accumulate)
    expected = plain.train(batches)
    *given, placement = before
    chain = tg.GraphChain(ConvNet(), client=four, placement=placement)
    first = tg.Trainer(
        chain, F.cross_entropy, ADAMW, microbatches=4, accumulate=accumulate, **options(*given)
    )
    losses = [first.step(x, y).item() for x, y in batches[:3]]
    first.save(tmp_path)
    *given, placement = after
    chain = tg.GraphChain(ConvNet(), client=four, placement=placement)
    second = tg.Trainer.restore(tmp_path, chain, F.cross_entropy, ADAMW, **options(*given))
    losses += [second.step(x, y).item() for x, y in batches[3:]]
    assert losses == expected
    assert_equal_to(chain, plain)


class Trap(nn.Module):
    """Raises, or kills its process, once where it was told so."""

    action = ""

    def forward(self, x):
        action, Trap.action = Trap.action, ""
        if action == "raise":
            raise ArithmeticError("sprung")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def set_trap(action: str) -> None:
    Trap.action = action


@pytest.mark.parametrize("replica", [0, 1])
def test_a_failed_step_is_taken_back_everywhere(four, executor, replica):
    def model() -> nn.Module:
        made = ConvNet()
        made[6] = nn.Sequential(made[6], Trap())
        return made

    batches = images(4)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=4)
    chain = tg.GraphChain(model(), client=four, placement=[0] * 5 + [1] * 6)
    trainer = tg.Trainer(
        chain, F.cross_entropy, ADAMW, microbatches=4, replicas=2, shard_optimizer=True
    )
    trap_at = trainer.plan.workers[2 * replica + 1].address
    losses = []
    for i, (x, y) in enumerate(batches):
        if i == 2:
            four.run(set_trap, "raise", workers=[trap_at])
            with pytest.raises(tg.LayerError, match=trap_at):
                trainer.step(x, y).item()
        losses.append(trainer.step(x, y).item())
    assert losses == plain.train(batches)
    ours = {n.replace("6.0.", "6."): v for n, v in chain.state_dict().items()}
    for name, value in plain.model.named_parameters():
        assert torch.equal(ours[name], value), name


def test_a_worker_of_a_replica_is_lost(fresh):
    client = fresh(n_workers=2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Trap(), nn.Flatten(), nn.Linear(72, 10))
    chain = tg.GraphChain(model, client=client, placement=[0] * 4)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=2, replicas=2)
    x, y = images(1)[0]
    trainer.step(x, y).item()
    lost = trainer.plan.workers[1].address
    client.run(set_trap, "kill", workers=[lost])
    with pytest.raises(tg.WorkerLostError, match=lost):
        trainer.step(x, y).item()
    with pytest.raises(tg.TaskgradError, match=lost):
        trainer.step(x, y).item()


def test_weights_that_are_loaded_reach_all_replicas(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    options = {"microbatches": 4, "replicas": 2, "shard_optimizer": True}
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, **options)
    batches = images(3)
    trainer.step(*batches[0]).item()
    torch.manual_seed(5)
    state = {
        n: torch.randn_like(v) if v.is_floating_point() else v
        for n, v in ConvNet().state_dict().items()
    }
    state |= {n: v.abs() for n, v in state.items() if n.endswith("running_var")}
    chain.load_state_dict(state)
    losses = [trainer.step(x, y).item() for x, y in batches[1:]]

    alone = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    other = tg.Trainer(alone, F.cross_entropy, SGD, microbatches=4)
    other.step(*batches[0]).item()
    alone.load_state_dict(state)
    assert losses == [other.step(x, y).item() for x, y in batches[1:]]


def test_buffers_are_those_of_the_first_replica(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=[0] * 10)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4, replicas=2)
    batches = images(3)
    for x, y in batches:
        trainer.step(x, y).item()
    buffers = {n: v for n, v in chain.state_dict().items() if "running" in n}
    there = four.run(_buffers, {shard.token for shard in trainer.layout.shards})
    found = [named for named in there.values() if named]
    assert len(found) == 2
    for named in found:
        for name, value in buffers.items():
            assert torch.equal(named[name], value), name
    assert chain.state_dict()["1.num_batches_tracked"] == 2 * len(batches)


def _buffers(tokens: set[str], dask_worker: Any) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": buffer.clone()
        for token, shard in store_of(dask_worker).entries().items()
        if token in tokens
        for index, layer in shard.layers.items()
        for name, buffer in layer.named_buffers()
    }


def test_what_the_chain_does_beside_its_trainer(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    trainer = tg.Trainer(
        chain, F.cross_entropy, SGD, microbatches=4, replicas=2, accumulate=2, shard_optimizer=True
    )
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=4, accumulate=2)
    batches = images(2)
    assert trainer.step(*batches[0]).item() == plain.train(batches[:1])[0]
    grads = tg.collect(chain.grads())  # some of them are on the other replica
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(grads[name], parameter.grad), name
    chain.zero_grad()
    assert all(grad is None for grad in tg.collect(chain.grads()).values())
    tg.spawn(torch.sum, chain.eval()(batches[0][0])).backward()
    model = ConvNet().eval()
    model.load_state_dict(chain.state_dict())
    _, alone, _ = reference(model, batches[0][0])
    grads = tg.collect(chain.grads())
    for name, grad in alone.items():
        torch.testing.assert_close(grads[name], grad)
    with pytest.raises(tg.TaskgradError, match="outside of its trainer"):
        trainer.step(*batches[1]).item()
    with pytest.raises(tg.TaskgradError, match="zero_grad"):
        tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4, replicas=2)


def test_a_second_trainer_drops_the_replicas(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4, replicas=2)
    batches = images(4)
    losses = [trainer.step(x, y).item() for x, y in batches[:2]]
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=4)
    assert losses == plain.train(batches[:2])
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4)
    plain.optimizer = SGD(plain.model.parameters())
    plain.steps = 0
    assert [trainer.step(x, y).item() for x, y in batches[2:]] == plain.train(batches[2:])
    del trainer
    chain_shards = {shard.token for shard in chain.layout.shards}
    gc.collect()
    assert wait_until(lambda: total_held(four)["shards"] == len(chain_shards), 10)
    del chain
    gc.collect()
    assert wait_until(lambda: not any(total_held(four).values()), 10)


def test_what_is_refused(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    make = partial(tg.Trainer, chain, F.cross_entropy, SGD)
    with pytest.raises(tg.PlacementError, match="6 workers, and the cluster has 4"):
        make(microbatches=4, replicas=3)
    with pytest.raises(ValueError, match="microbatches= at least 2"):
        make(replicas=2)
    with pytest.raises(ValueError, match="give replicas="):
        make(shard_optimizer=True)
    with pytest.raises(ValueError, match="replicas"):
        make(replicas=0)
    with pytest.raises(TypeError, match="replicas"):
        make(replicas="2")
    down = tg.GraphChain(nn.Sequential(nn.Linear(2, 2)), client=four, placement=[0])
    with pytest.raises(NotImplementedError, match="one GraphChain"):
        tg.Trainer(lambda x: down(x), F.mse_loss, SGD, microbatches=2, replicas=2)


def test_the_plan_prints_and_goes_through_json(four):
    chain = tg.GraphChain(ConvNet(), client=four, placement=CUT)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=5, replicas=2)
    plan = trainer.plan
    assert Plan.from_json(plan.to_json()) == plan
    assert "2 stages in 2 replicas on 4 workers, 5 microbatches" in str(plan)
    actions = [action for order in plan.orders for action in order if action.kind == "F"]
    assert len(actions) == len(set(actions)) == 2 * 5


@pytest.mark.parametrize("shard_optimizer", [True, *long(False)])
def test_averages_of_the_weights(four, shard_optimizer):
    def averages(**options: Any) -> dict[str, torch.Tensor]:
        ema = tg.EMA(0.9)
        chain = tg.GraphChain(transformer(), client=four, placement=[0, 0, 1, 1])
        trainer = tg.Trainer(chain, next_token, ADAMW, microbatches=4, callbacks=[ema], **options)
        for x, y in tokens(4):
            trainer.step(x, y)
        before = chain.state_dict()
        with ema.applied(trainer):
            found = chain.state_dict()
        assert all(torch.equal(value, before[n]) for n, value in chain.state_dict().items())
        return found

    ours = averages(replicas=2, shard_optimizer=shard_optimizer)
    for name, value in averages().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("replicas", "workers"), [(2, 1), *long_rows((2, 2), (3, 1))])
def test_a_model_of_transformers(four, replicas, workers):
    """Its own forward is followed, on each replica's workers."""
    from test_captured_training import gpt2, token_batches

    batches = token_batches(4)

    def train(**options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        placement = [layer * workers // 8 for layer in range(8)]
        chain = tg.GraphChain(
            gpt2(),
            client=four,
            example_inputs=batches[0],
            placement=placement,
            cut="transformer.h.*",
        )
        trainer = tg.Trainer(chain, None, ADAMW, microbatches=4, loss_weight="labels", **options)
        return [trainer.step(batch).item() for batch in batches], chain.state_dict()

    expected, state = train()
    losses, ours = train(replicas=replicas, shard_optimizer=True)
    assert losses == expected
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def test_gradients_travel_while_the_backward_runs(four, monkeypatch):
    monkeypatch.setattr(replicated_layout, "_BUCKET_BYTES", 1000)
    trainer = check(
        four, ConvNet(), ConvNet(), images(2), placement=[0] * 10, replicas=2, microbatches=2
    )
    assert [stage.title for stage in trainer.plan.stages] == ["0..3", "4..8", "9"]
    [lowered] = trainer._steps._runner._executor._lowered.values()
    done = [str(instruction) for instruction in lowered.programs[1].program.instructions]
    sends = [i for i, instruction in enumerate(done) if instruction.startswith(">0:grads")]
    assert len(sends) == 3
    assert sends[0] < done.index("BW1.1") < sends[1] < done.index("BW0.1") < sends[2]


class Bag(nn.Module):
    """Embeddings whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)

    def forward(self, x):
        return self.table((x * 10).long().clamp(0, 19)).mean(1)


def odd_models() -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    frozen[1].weight.requires_grad_(False)
    hooked = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    hooked[0].weight.register_hook(lambda grad: grad * 2)
    branches = tg.Parallel(torch.add, nn.Linear(8, 8), nn.Identity())
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    return {
        "sparse": nn.Sequential(Bag(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        "frozen": frozen,
        "hooked": hooked,
        "branches": nn.Sequential(nn.Linear(4, 8), branches, nn.ReLU(), nn.Linear(8, 3)),
        "parametrized": nn.Sequential(nn.Linear(4, 8), normed, nn.Linear(8, 3)),
    }


@pytest.mark.parametrize("shard_optimizer", [True, *long(False)])
@pytest.mark.parametrize("name", odd_models())
def test_odd_layers(four, name, shard_optimizer):
    """They train as in one replica."""
    torch.manual_seed(1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]

    def train(**options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = odd_models()[name]
        chain = tg.GraphChain(model, client=four, placement=None)
        placement = [2 * i // len(chain) for i in range(len(chain))]
        chain = tg.GraphChain(model, client=four, placement=placement)
        trainer = tg.Trainer(chain, F.cross_entropy, SGD_PLAIN, microbatches=4, **options)
        return [trainer.step(x, y).item() for x, y in batches], chain.state_dict()

    expected, state = train()
    losses, ours = train(replicas=2, shard_optimizer=shard_optimizer)
    assert losses == expected
    assert len(set(losses)) == 3
    for key, value in state.items():
        assert torch.equal(ours[key], value), key
