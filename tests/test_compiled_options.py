"""Every schedule of compiled steps with every option of a trainer: plain torch's bits."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import long, long_rows
from plain import (
    ConvNet,
    PlainTrainer,
    assert_same_training,
    images,
    next_token,
    tokens,
    transformer,
)
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.plan.rules import NAMES, schedule

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def placed(layers: int, workers: int, per_worker: int, *, v: bool = False) -> list[int]:
    """Layers in runs of equal length: round after round of the workers, or there and back."""
    stages = workers * per_worker
    turn = [i * stages // layers for i in range(layers)]
    return [stages - 1 - s if v and s >= workers else s % workers for s in turn]


def stages_of(name: str, layers: int, workers: int) -> list[int]:
    """A placement that suits a schedule."""
    per_worker = 2 if name in ("interleaved_1f1b", "zb_v") else 1
    return placed(layers, workers, per_worker, v=name == "zb_v")


@cache
def plain_after(microbatches: int, steps: int) -> tuple[PlainTrainer, list[float]]:
    """Plain torch after so many steps, with its losses."""
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=microbatches)
    return plain, plain.train(images(steps))


# (stages a worker, workers): both of the first with every schedule, and all numbers of workers.
SHAPES = {
    "gpipe": [(1, 4), (2, 2), (2, 3)],
    "1f1b": [(1, 3), (2, 2), (1, 4)],
    "interleaved_1f1b": [(2, 4), (1, 2), (2, 3)],
    "zb_h1": [(1, 1), (2, 2), (1, 4)],
    "zb_h2": [(1, 3), (2, 4), (2, 1)],
    "zb_v": [(2, 3), (1, 4), (2, 1), (1, 2)],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "per_worker", "workers"), [(n, *s) for n in NAMES for s in SHAPES[n]]
)
def test_bits_after_20_steps(four, name, per_worker, workers):
    """With any number of microbatches from 1 to 8, and no step that waits for a flush."""
    placement = placed(10, workers, per_worker, v=name == "zb_v")
    for microbatches in range(1, 9):
        plain, expected = plain_after(microbatches, 20)
        chain = tg.GraphChain(ConvNet(), client=four, placement=placement)
        options = {"microbatches": microbatches, "schedule": name, "executor": "compiled"}
        trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, **options)
        assert not trainer.plan.flush
        losses = [trainer.step(x, y) for x, y in images(20)]
        assert [loss.item() for loss in losses] == expected
        assert_same_training(chain, plain, four)


def uneven(steps: int):
    return [
        (x[:n], y[:n])
        for (x, y), n in zip(images(steps), [10, 7, 4, 5] * (steps // 4), strict=True)
    ]


def frozen() -> ConvNet:
    model = ConvNet()
    for layer in (model[0], model[5]):
        layer.requires_grad_(False)
    return model


def large_loss(scores, targets):
    return next_token(scores, targets) * 30


IMAGES = ConvNet, F.cross_entropy, images
TOKENS = transformer, next_token, tokens
OPTIONS = {
    "clip_norm": (*IMAGES, {"clip_norm": 0.5}, {}),
    "accumulate, uneven": (ConvNet, F.cross_entropy, uneven, {"accumulate": 2}, {}),
    "bf16": (*TOKENS, {"autocast": torch.bfloat16}, {"amp": "bf16"}),
    "fp16": (
        *(transformer, large_loss, tokens),
        {"autocast": torch.float16, "clip_norm": 1.0},
        {"amp": "fp16"},
    ),
    "tied": (partial(transformer, tied=True), next_token, tokens, {"clip_norm": 0.2}, {}),
    "tied, no flush": (partial(transformer, tied=True), next_token, tokens, {}, {}),
    "frozen": (frozen, F.cross_entropy, images, {}, {}),
    "checkpoint": (*IMAGES, {}, {"checkpoint": "always"}),
    "checkpoint, transformer": (*TOKENS, {}, {"checkpoint": "except_last"}),
}
QUICK = [
    ("interleaved_1f1b", "accumulate, uneven"),
    ("zb_v", "clip_norm"),
    ("zb_h2", "tied, no flush"),
    ("zb_h2", "fp16"),
    ("zb_v", "checkpoint"),
    ("zb_h1", "bf16"),
]
REST = [(s, o) for o in OPTIONS for s in NAMES if (s, o) not in QUICK]


@pytest.mark.parametrize(("name", "option"), [*QUICK, *long_rows(*REST)])
def test_options(four, tmp_path, name, option):
    """With a checkpoint in the middle, from which another chain goes on."""
    make, loss_fn, batches, both, ours = OPTIONS[option]
    both = {"microbatches": 4, **both}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16) if option == "fp16" else None
    plain = PlainTrainer(make(), loss_fn, ADAMW, scaler=scaler, **both)
    both.pop("autocast", None)
    data = batches(8)
    expected = plain.train(data)

    placement = stages_of(name, len(make()), 2 if make is not ConvNet else 3)
    options = {**both, **ours, "schedule": name, "executor": "compiled"}
    first = tg.Trainer(
        tg.GraphChain(make(), client=four, placement=placement), loss_fn, ADAMW, **options
    )
    losses = [first.step(x, y) for x, y in data[:5]]
    first.save(tmp_path)
    chain = tg.GraphChain(make(), client=four, placement=placement)
    trainer = tg.Trainer.restore(tmp_path, chain, loss_fn, ADAMW)
    assert trainer.plan.schedule == name
    assert trainer.steps == 5
    losses += [trainer.step(x, y) for x, y in data[5:]]
    assert [loss.item() for loss in losses] == expected
    assert_same_training(chain, plain, four)
    assert all("waiting" in loss.report for loss in losses)  # by programs
    if option == "fp16":
        assert True in {loss.report["skipped"] for loss in losses}


@pytest.mark.parametrize("name", ["zb_h2", "interleaved_1f1b", *long("gpipe", "zb_h1", "zb_v")])
def test_a_loss_that_is_not_finite(four, name):
    """In the last microbatch, when others have gone back, and in a step that has another behind."""
    placement = stages_of(name, 10, 2)
    options = {"microbatches": 5, "schedule": name}
    chain = tg.GraphChain(ConvNet(), client=four, placement=placement)
    trainer = tg.Trainer(
        chain, F.cross_entropy, ADAMW, check_finite=True, executor="compiled", **options
    )
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=5)
    data = images(6)
    losses = [trainer.step(x, y).item() for x, y in data[:2]]
    x, y = data[2]
    bad = x.clone()
    bad[-1] = torch.nan
    failed = [trainer.step(bad, y), trainer.step(x, y)]
    for loss in failed:
        with pytest.raises(tg.LayerError, match="microbatch 4 of step 2: the loss is nan"):
            loss.item()
    assert trainer.steps == 2
    assert wait_until(lambda: total_held(four)["tapes"] == 0)
    losses += [trainer.step(x, y).item() for x, y in data[2:]]
    assert losses == plain.train(data)
    assert_same_training(chain, plain, four)


@pytest.mark.parametrize("name", ["zb_v", *long("interleaved_1f1b", "zb_h1", "zb_h2")])
def test_compiled_layers(four, name):
    """Their backwards are whole, whatever the schedule, and so the bits are the same."""
    found = []
    for each in ("1f1b", name):
        chain = tg.GraphChain(ConvNet(), client=four, placement=stages_of(each, 10, 2))
        options = {"microbatches": 2, "compile": {"backend": "aot_eager"}, "schedule": each}
        trainer = tg.Trainer(chain, F.cross_entropy, SGD, executor="compiled", **options)
        found.append(([trainer.step(x, y).item() for x, y in images(2)], chain.state_dict()))
    (expected, state), (losses, ours) = found
    assert losses == expected
    assert all(torch.equal(ours[key], value) for key, value in state.items())
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=2)
    assert losses == pytest.approx(plain.train(images(2)), rel=1e-5)


@pytest.mark.parametrize("name", ["zb_h2", *long("interleaved_1f1b", "zb_h1", "zb_v")])
def test_deferred_batch_norm(four, name):
    """Running statistics of the whole batch, though the next step starts before this one ends."""
    still = partial(torch.optim.SGD, lr=0.0)
    chain = tg.GraphChain(ConvNet(), client=four, placement=stages_of(name, 10, 3))
    options = {"microbatches": 4, "schedule": name, "deferred_batch_norm": True}
    trainer = tg.Trainer(chain, F.cross_entropy, still, executor="compiled", **options)
    batches = images(4, 9)
    for x, y in batches:
        trainer.step(x, y)
    trainer.wait()
    first = nn.Sequential(*list(ConvNet())[:2])
    for x, _ in batches:
        first(x)
    state = chain.state_dict()
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(state[f"1.{key}"], first[1].state_dict()[key])
    assert state["5.num_batches_tracked"] == 4


class CountsTapes(nn.Linear):
    """Remembers the most tapes that its worker held when it ran, with its own."""

    def forward(self, x):
        store = store_of(get_worker())
        store.most = max(getattr(store, "most", 0), 1 + store.held()["tapes"])
        return super().forward(x)


def take_most(dask_worker) -> int:
    store = store_of(dask_worker)
    return store.__dict__.pop("most", 0)


@pytest.mark.parametrize("workers", [4, *long(2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_peak_of_tapes_is_what_the_schedule_states(four, name, workers):
    assert wait_until(lambda: not total_held(four)["tapes"])
    four.run(take_most)
    torch.manual_seed(0)
    placement = stages_of(name, 8, workers)
    model = nn.Sequential(*(CountsTapes(4, 4) for _ in placement))
    chain = tg.GraphChain(model, client=four, placement=placement)
    options = {"microbatches": 9, "schedule": name, "executor": "compiled"}
    trainer = tg.Trainer(chain, F.mse_loss, SGD, **options)
    for _ in range(3):
        trainer.step(torch.ones(9, 4), torch.zeros(9, 4))
    trainer.wait()
    stated = schedule(name, trainer.plan.pipeline, 9).peak_tapes()
    most = four.run(take_most)
    assert [most[worker.address] for worker in trainer.plan.workers] == list(stated)
    assert not total_held(four)["tapes"]
