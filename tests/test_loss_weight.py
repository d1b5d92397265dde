"""Weights of losses: microbatches and accumulated batches give what the whole gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from helpers import assert_same

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.3)
ADAMW = partial(torch.optim.AdamW, lr=0.05)
LENGTHS = ([9, 1, 8, 2, 1, 1], [2, 9, 1, 1, 1, 9], [1, 1, 1, 2, 1, 1], [9, 9, 9, 9, 3, 9])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16))


def token_loss(output, labels):
    return F.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=-100)


def own_token_loss(output, labels):
    """The same, but NaN in loss and gradient where no label counts."""
    valid = (labels != -100).flatten()
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
    return (losses * valid).sum() / valid.sum()


def tokens(x, y):
    return (y != -100).sum()


def padded(lengths, at=0):
    """Rows of tokens with labels, of which so many count."""
    torch.manual_seed(1 + at)
    x, y = torch.randint(16, (2, len(lengths), 9))
    for row, length in zip(y, lengths, strict=True):
        row[length:] = -100
    return x, y


def data():
    return [padded(lengths, at) for at, lengths in enumerate(LENGTHS)]


def trainer_of(client, loss=token_loss, optimizer=SGD, **options):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    return tg.Trainer(chain, loss, optimizer, **{"loss_weight": tokens, **options})


def whole(batches, optimizer, accumulate, clip_norm=None):
    """Plain torch that takes the accumulated batches as one; its model and losses by batch."""
    model = net()
    made = optimizer(model.parameters())
    losses = []
    for i in range(0, len(batches), accumulate):
        part = batches[i : i + accumulate]
        with torch.no_grad():
            losses += [token_loss(model(x), y).item() for x, y in part]
        x, y = (torch.cat(values) for values in zip(*part, strict=True))
        token_loss(model(x), y).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        made.step()
        made.zero_grad()
    return model, losses


def assert_same_bits(ours, theirs):
    for name, value in theirs.items():
        assert_same(ours[name], value, name)


def assert_close(ours, theirs, rtol=1e-5, atol=1e-6):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "clip_norm"),
    [(SGD, 1, None), (SGD, 2, None), (SGD, 2, 0.05), (ADAMW, 2, 0.05), (ADAMW, 4, None)],
)
def test_padded_batches_are_trained_as_one(client, optimizer, accumulate, clip_norm):
    model, losses = whole(data(), optimizer, accumulate, clip_norm)
    options = {"microbatches": 3, "accumulate": accumulate, "clip_norm": clip_norm}
    trainer = trainer_of(client, optimizer=optimizer, **options)
    found = [trainer.step(x, y).item() for x, y in data()]
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(trainer.chain.state_dict(), model.state_dict())
    assert abs(trainer_of(client, loss_weight=None, microbatches=3).step(*data()[0]).item()
               - losses[0]) > 1e-3  # fmt: skip


def test_weights_that_are_numbers_of_samples_change_no_bits(client):
    """With fp16 steps are skipped, too: the scale is too large at first."""
    batches = [(x, y.clamp(min=0)) for x, y in data()] * 3
    options = {"microbatches": 4, "accumulate": 2, "clip_norm": 0.1, "optimizer": ADAMW}
    for amp in (None, "fp16"):
        states = []
        for weight in (None, lambda x, y: len(y)):
            trainer = trainer_of(client, loss_weight=weight, amp=amp, **options)
            losses = [trainer.step(x, y) for x, y in batches]
            reports = [(loss.item(), loss.report["grad_norm"]) for loss in losses]
            states.append((trainer.chain.state_dict(), reports))
        assert states[0][1] == states[1][1]
        assert_same_bits(states[0][0], states[1][0])


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_microbatch_of_weight_zero_counts_for_nothing(client, schedule):
    x, y = padded([9, 3, 0, 0, 2, 1])
    model, losses = whole([(x, y)], SGD, 1)
    options = {"schedule": schedule, "check_finite": True}
    trainer = trainer_of(client, own_token_loss, microbatches=3, **options)
    assert trainer.step(x, y).item() == pytest.approx(losses[0], rel=1e-5)
    assert_close(trainer.chain.state_dict(), model.state_dict())
    if schedule == "1f1b":  # that of a microbatch which counts still has to be finite
        with pytest.raises(tg.LayerError, match="the loss is nan"):
            trainer_of(
                client, own_token_loss, microbatches=3, loss_weight=lambda x, y: 1, **options
            ).step(x, y).item()


def test_programs_are_not_made_anew_for_other_weights(client, executor):
    trainer = trainer_of(client, microbatches=3, accumulate=2)
    losses = [trainer.step(x, y) for x, y in data() * 2]
    assert len({loss.item() for loss in losses}) == len(losses)
    if executor == "compiled":
        assert len(trainer._steps._runner._loaded) == 2  # with an update, and without


def test_a_training_that_is_restored_between_updates_keeps_the_weights(client, tmp_path):
    options = {"microbatches": 2, "accumulate": 3, "optimizer": ADAMW}
    batches = data() + data()[:2]
    undisturbed = trainer_of(client, **options)
    for x, y in batches:
        undisturbed.step(x, y)
    expected = undisturbed.chain.state_dict()
    trainer = trainer_of(client, **options)
    for x, y in batches[:5]:
        trainer.step(x, y)
    trainer.save(tmp_path)
    again = tg.GraphChain(net(), client=client, placement=[0, 1, 1, 1])
    with pytest.raises(tg.CheckpointError, match="give loss_weight= again"):
        tg.Trainer.restore(tmp_path, again, token_loss, ADAMW)
    with pytest.raises(tg.CheckpointError, match="saved with a loss_weight"):
        tg.Trainer.restore(tmp_path, again, token_loss, ADAMW, loss_weight=None)
    restored = tg.Trainer.restore(tmp_path, again, token_loss, ADAMW, loss_weight=tokens)
    restored.step(*batches[5]).item()
    assert_same_bits(again.state_dict(), expected)


def test_a_step_that_is_taken_back_takes_back_its_weight(client):
    options = {"microbatches": 2, "accumulate": 3}
    undisturbed = trainer_of(client, **options)
    for x, y in data()[:3]:
        undisturbed.step(x, y)
    trainer = trainer_of(client, **options)
    trainer.step(*data()[0])
    x, y = data()[3]
    with pytest.raises(tg.LayerError, match="loss"):
        trainer.step(x, torch.where(y == -100, y, 99)).item()
    assert trainer.steps == 1
    for x, y in data()[1:3]:
        trainer.step(x, y)
    assert_same_bits(trainer.chain.state_dict(), undisturbed.chain.state_dict())


class Looks(tg.Callback):
    """Reads the state after some steps, when the next one has begun: that is taken back."""

    def __init__(self, executor):
        self.says_so = executor == "futures"  # whose steps cannot be taken back

    def reads_state(self, step):
        return self.says_so

    def on_step(self, trainer, loss):
        if loss.step in (2, 5):
            trainer.chain.state_dict()


def test_steps_that_are_taken_again_for_a_callback_have_their_weights(client, executor):
    states = []
    for callbacks in ([], [Looks(executor)]):
        trainer = trainer_of(client, microbatches=2, accumulate=3, callbacks=callbacks)
        trainer.fit(data() * 3, progress=False)
        states.append(trainer.chain.state_dict())
    assert_same_bits(*states)


def test_epochs_and_evaluations_are_means_by_weight(client):
    model = net()
    with torch.no_grad():
        losses = [token_loss(model(x), y).item() for x, y in data()]
    counts = [int(tokens(None, y)) for _, y in data()]
    expected = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
    still = partial(torch.optim.SGD, lr=0.0)
    trainer = trainer_of(client, optimizer=still, microbatches=2)
    empty = padded([0] * 2)
    found = trainer.evaluate([*data(), empty], {"rows": lambda output, y: float(len(y))})
    rows = (4 * 6 * 6 + 2 * 2) / (4 * 6 + 2)  # a metric's mean is over samples
    assert found == pytest.approx({"loss": expected, "rows": rows}, rel=1e-5)
    [results] = trainer.fit(data(), val_loader=data(), progress=False)
    assert results == pytest.approx({"loss": expected, "val_loss": expected}, rel=1e-5)
    assert abs(sum(losses) / len(losses) - expected) > 1e-3
    loss = trainer.step(*data()[0])
    assert (loss.size, loss.weight) == (6, counts[0])
    with pytest.raises(ValueError, match="0 for every batch"):
        trainer.evaluate([empty])


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (lambda x, y: -1, ValueError, "from 0 on; it gave -1"),
        (lambda x, y: float("nan"), ValueError, "a finite number from 0 on; it gave nan"),
        (lambda x, y: "many", TypeError, "a number; it gave 'many'"),
        (lambda x, y: y, TypeError, "a number; it gave"),
        (lambda x, y: 0, ValueError, "0 for all microbatches of the batch"),
        ("labels", ValueError, "'labels' names a field of a batch that is a dict"),
    ],
)
def test_weights_that_make_no_sense(client, weight, error, words):
    trainer = trainer_of(client, microbatches=2, loss_weight=weight)
    with pytest.raises(error, match=words):
        trainer.step(*data()[0])
    assert trainer.steps == 0


def test_what_cannot_be_weighed_is_refused(client):
    with pytest.raises(ValueError, match="this one is a sum"):
        trainer_of(client, nn.CrossEntropyLoss(reduction="sum"))
    trainer = trainer_of(client)
    x, y = (tg.spawn(torch.clone, value, worker=0) for value in data()[0])
    with pytest.raises(ValueError, match="weighs batches on the driver"):
        trainer.step(x, y)
    with pytest.raises(ValueError, match="weighs batches on the driver"):
        trainer.evaluate([(x, y)])


def test_a_field_of_the_targets_counts_all_its_labels(client):
    def loss(output, targets):
        return token_loss(output, targets["ids"])

    batches = [(x, {"ids": y, "name": "a"}) for x, y in data()[:2]]
    model, losses = whole(data()[:2], SGD, 2)
    trainer = trainer_of(client, loss, loss_weight="ids", microbatches=3, accumulate=2)
    assert [trainer.step(x, y).item() for x, y in batches] == pytest.approx(losses, rel=1e-5)
    assert_close(trainer.chain.state_dict(), model.state_dict())
