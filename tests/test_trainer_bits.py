"""Training over workers is plain torch's training, to the bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import taskgrad as tg
from helpers import long, long_rows
from plain import (
    ConvNet,
    PlainTrainer,
    assert_same_training,
    images,
    next_token,
    optimizer_state,
    tokens,
    transformer,
)

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
STEPS = 20


def spread(model: nn.Module, workers: int) -> list[int]:
    """Layers in runs of equal length, one a worker."""
    n = len(model)
    return [i * workers // n for i in range(n)]


def compare(client, make, loss_fn, batches, workers, optimizer, ours=None, **both):
    """Train the same model both ways; returns the chain and plain torch's trainer."""
    model = make()
    chain = tg.GraphChain(model, client=client, placement=spread(model, workers))
    trainer = tg.Trainer(chain, loss_fn, optimizer, **both, **(ours or {}))
    plain = PlainTrainer(make(), loss_fn, optimizer, **both)
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    assert_same_training(chain, plain, client)
    return chain, plain


# Every number of workers, and every number of microbatches with few workers and with many.
CUTS = [(3, 3), *long_rows((1, 1), (2, 4), (3, 1), (4, 3), (4, 4))]


@pytest.mark.parametrize(("workers", "microbatches"), CUTS)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SGD, {"lr_scheduler": partial(StepLR, step_size=6)}),
        (ADAMW, {"clip_norm": 0.5, "lr_scheduler": partial(CosineAnnealingLR, T_max=STEPS)}),
    ],
    ids=["sgd", "adamw"],
)
def test_conv_net_with_batch_norm(four, workers, microbatches, optimizer, options):
    batches = images(STEPS)
    options = {**options, "microbatches": microbatches}
    compare(four, ConvNet, F.cross_entropy, batches, workers, optimizer, **options)


@pytest.mark.parametrize(("workers", "microbatches"), CUTS)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SGD, {"clip_norm": 0.1}),
        (ADAMW, {"clip_norm": 0.5, "lr_scheduler": partial(StepLR, step_size=6)}),
    ],
    ids=["sgd", "adamw"],
)
def test_transformer_with_dropout(four, workers, microbatches, optimizer, options):
    options = {**options, "microbatches": microbatches, "seed": 3}
    compare(four, transformer, next_token, tokens(STEPS), workers, optimizer, **options)


@pytest.mark.parametrize("microbatches", [4, *long(1)])
@pytest.mark.parametrize("workers", [1, 2, *long(3)])
def test_tied_weights_over_two_workers(four, workers, microbatches):
    tied = partial(transformer, tied=True)
    options = {"microbatches": microbatches, "clip_norm": 0.2}
    chain, _ = compare(four, tied, next_token, tokens(8), workers, ADAMW, **options)
    copies = [n for stage in chain.layout.shards for n in stage.homes]
    assert copies == ([] if workers == 1 else ["0.token.weight"])
    state = chain.state_dict()
    assert torch.equal(state["0.token.weight"], state["3.weight"])
    assert "3.weight" not in optimizer_state(four, chain)


def test_copies_of_tied_weights_are_equal_after_each_step(four):
    chain = tg.GraphChain(transformer(tied=True), client=four, placement=[0, 0, 1, 2])
    trainer = tg.Trainer(chain, next_token, ADAMW, microbatches=2)
    before = chain.state_dict()["3.weight"]
    for x, y in tokens(3):
        trainer.step(x, y).item()
        state = chain.state_dict()  # each layer's as its own worker has it
        assert torch.equal(state["0.token.weight"], state["3.weight"])
        assert not torch.equal(before, state["3.weight"])
        before = state["3.weight"]


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("gpipe", {"placement": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]}),
        ("1f1b", {"placement": "v"}),
        ("interleaved_1f1b", {"stages_per_worker": 2}),
        ("zb_h1", {}),
        ("zb_h2", {}),
        ("zb_v", {"placement": "v"}),
    ],
)
def test_every_schedule_gives_the_same_bits(four, schedule, options):
    chain = tg.GraphChain(ConvNet(), client=four, **options)
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=4, schedule=schedule)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=4)
    losses = [trainer.step(x, y) for x, y in images(5)]
    assert [loss.item() for loss in losses] == plain.train(images(5))
    assert_same_training(chain, plain, four)


def test_a_schedule_of_the_users_own(four):
    from taskgrad.plan.rules import schedule
    from taskgrad.plan.schedule import Schedule

    asked = []

    def one_at_a_time(pipeline, microbatches):
        asked.append(microbatches)
        single = schedule("gpipe", pipeline, 1)
        orders = [
            [a._replace(microbatch=m) for m in range(microbatches) for a in order]
            for order in single.orders
        ]
        return Schedule("one at a time", pipeline, microbatches, tuple(map(tuple, orders)))

    ours = {"schedule": one_at_a_time}
    compare(four, ConvNet, F.cross_entropy, images(3), 2, SGD, ours, microbatches=3)
    assert asked == [3]


def test_accumulate_is_the_mean_of_batches(four):
    compare(four, ConvNet, F.cross_entropy, images(6), 2, ADAMW, microbatches=2, accumulate=3)


def test_frozen_layers_stay_as_they_are(four):
    def frozen():
        model = ConvNet()
        for layer in (model[0], model[4]):
            layer.requires_grad_(False)
        return model

    chain, _ = compare(four, frozen, F.cross_entropy, images(4), 3, ADAMW, microbatches=2)
    assert torch.equal(chain.state_dict()["0.weight"], ConvNet()[0].weight)


def test_bf16_is_torchs_autocast(four):
    model = ConvNet()
    chain = tg.GraphChain(model, client=four, placement=spread(model, 2))
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, microbatches=2, amp="bf16")
    plain = PlainTrainer(ConvNet(), F.cross_entropy, SGD, microbatches=2, autocast=torch.bfloat16)
    losses = [trainer.step(x, y) for x, y in images(4)]
    assert [loss.item() for loss in losses] == plain.train(images(4))
    assert_same_training(chain, plain, four)


def test_fp16_scales_as_torchs_grad_scaler(four):
    """The first steps overflow, and are skipped on all stages, until the scale is small enough."""
    batches = tokens(10)
    model = transformer()
    chain = tg.GraphChain(model, client=four, placement=spread(model, 3))
    trainer = tg.Trainer(chain, large_loss, ADAMW, microbatches=2, amp="fp16", clip_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain = PlainTrainer(
        transformer(),
        large_loss,
        ADAMW,
        microbatches=2,
        clip_norm=1.0,
        autocast=torch.float16,
        scaler=scaler,
    )
    losses = [trainer.step(x, y) for x, y in batches]
    assert [loss.item() for loss in losses] == plain.train(batches)
    skipped = [loss.report["skipped"] for loss in losses]
    assert True in skipped
    assert False in skipped
    assert scaler.get_scale() == 2.0 ** (16 - sum(skipped))
    assert_same_training(chain, plain, four)


def large_loss(scores, targets):
    return next_token(scores, targets) * 30


@pytest.mark.parametrize(
    "checkpoint", ["always", *long("except_last", lambda name: name in ("1", "3", "5"))]
)
@pytest.mark.parametrize("make", ["conv", "transformer"])
def test_recomputing_changes_no_bit(four, checkpoint, make):
    """Dropout draws the same again, and batch norm does not count a batch twice."""
    ours = {"checkpoint": checkpoint}
    if make == "conv":
        args = ConvNet, F.cross_entropy, images(5), 2, SGD, ours
    else:
        args = partial(transformer, tied=True), next_token, tokens(5), 3, ADAMW, ours
    compare(four, *args, microbatches=3)


def test_parameter_groups(four):
    options = {"*.bias": {"weight_decay": 0.0, "lr": 0.5}, "9.*": {"lr": 0.2}}

    def grouped(parameters):
        named = list(ConvNet().named_parameters())
        parameters = dict(zip([n for n, _ in named], parameters, strict=True))
        biases = [p for n, p in parameters.items() if n.endswith(".bias")]
        last = [parameters["9.weight"]]
        rest = [p for n, p in parameters.items() if n != "9.weight" and not n.endswith(".bias")]
        return ADAMW(
            [
                {"params": rest},
                {"params": biases, **options["*.bias"]},
                {"params": last, **options["9.*"]},
            ]
        )

    model = ConvNet()
    chain = tg.GraphChain(model, client=four, placement=spread(model, 3))
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, param_groups=options)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, grouped)
    losses = [trainer.step(x, y) for x, y in images(3)]
    assert [loss.item() for loss in losses] == plain.train(images(3))
    assert_same_training(chain, plain, four)


def test_clip_value_comes_after_clip_norm(four):
    model = ConvNet()
    chain = tg.GraphChain(model, client=four, placement=spread(model, 2))
    trainer = tg.Trainer(chain, F.cross_entropy, SGD, clip_norm=1.0, clip_value=0.01)
    reference = ConvNet().train()
    plain = PlainTrainer(reference, F.cross_entropy, SGD)
    plain._update = lambda: clip_both(reference, plain.optimizer)
    losses = [trainer.step(x, y) for x, y in images(3)]
    assert [loss.item() for loss in losses] == plain.train(images(3))
    assert_same_training(chain, plain, four)
    assert losses[0].report["grad_norm"] > 1.0


def clip_both(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad()
