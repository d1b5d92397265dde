"""The ready callbacks: against plain torch, and over a training that is cut off and restored."""

from __future__ import annotations

import csv
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import StepLR

import taskgrad as tg
from plain import PlainTrainer

SGD = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)
TIMES = {"bubble", "seconds"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def data(batches: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Half of the labels are at random: the validation loss soon gets worse."""
    torch.manual_seed(seed)
    found = []
    for _ in range(batches):
        x = torch.randn(8, 4)
        t = x[:, :3].argmax(dim=1)
        t[::2] = torch.randint(3, (4,))
        found.append((x, t))
    return found


TRAIN, VAL = data(4), data(2, seed=2)


def trainer_of(callbacks: Sequence[tg.Callback], **options: Any) -> tg.Trainer:
    return tg.Trainer(
        tg.GraphChain(network()), F.cross_entropy, SGD, callbacks=callbacks, **options
    )


def restored(path: Path, callbacks: Sequence[tg.Callback], **options: Any) -> tg.Trainer:
    chain = tg.GraphChain(network())
    return tg.Trainer.restore(path, chain, F.cross_entropy, SGD, callbacks=callbacks, **options)


def fit(trainer: tg.Trainer, epochs: int, **options: Any) -> list[dict[str, float]]:
    return trainer.fit(TRAIN, epochs, VAL, progress=False, **options)


@functools.cache
def plain_epochs(epochs: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The validation loss and the weights after each epoch of plain torch."""
    plain = PlainTrainer(network(), F.cross_entropy, SGD)
    found = []
    for _ in range(epochs):
        plain.train(TRAIN)
        with torch.no_grad():
            losses = [float(F.cross_entropy(plain.model(x), t)) for x, t in VAL]
        weights = {name: value.clone() for name, value in plain.model.state_dict().items()}
        found.append((sum(losses) / len(losses), weights))
    return found


def assert_weights(path: Path | None, expected: dict[str, torch.Tensor]) -> None:
    assert path is not None
    found = tg.load_state_dict(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class CutOff(tg.Callback):
    """Ends a training in the middle of an epoch, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, loss):
        if loss.step == self.step:
            raise RuntimeError("cut off")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def without_times(file: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(file)]


# Early stopping


def stopping_point(losses: list[float], patience: int) -> tuple[int, int]:
    """The best epoch, and that after which training ends."""
    for epoch in range(len(losses)):
        best = losses.index(min(losses[: epoch + 1]))
        if epoch - best == patience:
            return best, epoch
    raise AssertionError("these losses end no training")


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_when_the_validation_loss_has_not_improved(client, patience):
    losses = [loss for loss, _ in plain_epochs(20)]
    best, stopped = stopping_point(losses, patience)
    stopping = tg.EarlyStopping(patience=patience)
    history = fit(trainer_of([stopping]), 20)
    assert len(history) == stopped + 1
    assert [epoch["val_loss"] for epoch in history] == pytest.approx(losses[: stopped + 1])
    assert (stopping.best_epoch, stopping.stopped_epoch) == (best, stopped)
    assert stopping.best == history[best]["val_loss"]


def test_the_training_loss_is_compared_where_there_is_no_other(client):
    stopping = tg.EarlyStopping(mode="max", patience=2)
    history = trainer_of([stopping]).fit(TRAIN, 9, progress=False)
    assert history[0]["loss"] > history[1]["loss"] > history[2]["loss"]
    assert len(history) == 3
    assert (stopping.best, stopping.best_epoch) == (history[0]["loss"], 0)


def test_what_is_better_by_too_little_is_no_improvement(client):
    losses = [loss for loss, _ in plain_epochs(20)]
    best, _ = stopping_point(losses, 3)
    assert 0 < best < 3
    stopping = tg.EarlyStopping(min_delta=losses[0] - losses[best] + 1e-6)
    assert len(fit(trainer_of([stopping]), 20)) == 4
    assert stopping.best_epoch == 0


def test_what_is_not_a_number_is_never_the_best(client, tmp_path):
    stopping = tg.EarlyStopping("val_odd", mode="max", patience=2)
    kept = tg.ModelCheckpoint(tmp_path, "val_odd", mode="max")

    def odd(output, targets):
        return math.nan

    history = fit(trainer_of([stopping, kept]), 9, metrics={"odd": odd})
    assert len(history) == 2
    assert (stopping.best, stopping.best_epoch, stopping.stopped_epoch) == (None, None, 1)
    assert kept.best is None
    assert kept.best_path is None
    assert kept.last_path is not None


@pytest.mark.parametrize("of", [tg.EarlyStopping, functools.partial(tg.ModelCheckpoint, "unused")])
def test_the_name_of_no_result_is_told_with_those_that_there_are(client, of):
    with pytest.raises(ValueError, match="monitors 'accuracy'.*there is 'loss', 'val_loss'"):
        fit(trainer_of([of(monitor="accuracy")]), 1)


def test_arguments_are_checked_when_callbacks_are_made(tmp_path):
    for wrong, message in [
        ({"mode": "least"}, 'mode is "min" or "max"'),
        ({"patience": 0}, "patience is at least 1"),
        ({"min_delta": -1.0}, "min_delta is a finite number from 0 on"),
        ({"min_delta": math.nan}, "min_delta is a finite number from 0 on"),
    ]:
        with pytest.raises(ValueError, match=message):
            tg.EarlyStopping(**wrong)
    with pytest.raises(TypeError, match="monitor is the name of a result"):
        tg.EarlyStopping(monitor=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is at least 1"):
        tg.ModelCheckpoint(tmp_path, every=0)
    for kind in (tg.ModelCheckpoint, tg.CSVLogger, tg.TensorBoardLogger):
        with pytest.raises(TypeError, match="a path is a string"):
            kind(None)


def test_a_restored_training_is_stopped_where_it_would_have_been(client, tmp_path):
    whole = tg.EarlyStopping()
    history = fit(trainer_of([whole]), 20)
    # The one that saves is called last, wherever it is in the list.
    first = tg.EarlyStopping()
    fit(trainer_of([tg.ModelCheckpoint(tmp_path), first]), len(history) - 2)
    assert first.stopped_epoch is None
    again = tg.EarlyStopping()
    rest = fit(restored(tmp_path / "last", [tg.ModelCheckpoint(tmp_path), again]), 20)
    assert rest == history
    assert (again.best, again.best_epoch) == (whole.best, whole.best_epoch)
    assert again.stopped_epoch == whole.stopped_epoch


def test_a_training_that_was_stopped_stays_so_unless_it_may_wait_longer(client, tmp_path):
    first = tg.EarlyStopping(patience=1)
    trainer = trainer_of([first, tg.ModelCheckpoint(tmp_path)])
    fit(trainer, 20)
    steps = trainer.steps
    same = restored(tmp_path / "last", [tg.EarlyStopping(patience=1)])
    fit(same, 20)
    assert same.steps == steps
    patient = tg.EarlyStopping(patience=3)
    longer = restored(tmp_path / "last", [patient])
    fit(longer, 20)
    expected = stopping_point([loss for loss, _ in plain_epochs(20)], 3)
    assert (patient.best_epoch, patient.stopped_epoch) == expected
    assert longer.steps == (expected[1] + 1) * len(TRAIN)
    for ended in (trainer, longer):  # who calls fit again wants more
        steps = ended.steps
        fit(ended, 1)
        assert ended.steps == steps + len(TRAIN)


class StopAt(tg.Callback):
    """Stops a training in the middle of an epoch, as a limit of time would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, loss):
        if loss.step == self.step:
            trainer.stop()


@pytest.mark.parametrize("monitor", [None, "val_loss"])
@pytest.mark.parametrize("whole", [0, 1], ids=["the first epoch", "the second"])
def test_an_epoch_that_was_stopped_before_its_validation_is_not_compared(
    client, tmp_path, monitor, whole
):
    callbacks = [tg.EarlyStopping(monitor, patience=1), tg.ModelCheckpoint(tmp_path, monitor)]
    trainer = trainer_of([*callbacks, StopAt(whole * len(TRAIN) + 1)])
    history = fit(trainer, 5)
    assert [list(results) for results in history] == [["loss", "val_loss"]] * whole + [["loss"]]
    for callback in callbacks:
        assert callback.best_epoch == (0 if whole else None)
    assert callbacks[0].stopped_epoch is None
    assert_weights(tmp_path / "last", trainer.chain.state_dict())
    # A fit that follows compares the result that it would have compared.
    trainer = trainer_of(callbacks)
    fit(trainer, 1)
    assert callbacks[1].monitor == "val_loss"


# Checkpoints


def test_the_best_checkpoint_has_the_weights_of_its_epoch(client, tmp_path):
    expected = plain_epochs(8)
    losses = [loss for loss, _ in expected]
    best = losses.index(min(losses))
    assert 0 < best < 7
    kept = tg.ModelCheckpoint(tmp_path / "run")
    assert (kept.best_path, kept.last_path) == (None, None)
    history = fit(trainer_of([kept]), 8)
    assert (kept.best, kept.best_epoch) == (history[best]["val_loss"], best)
    assert kept.best_path == tmp_path / "run" / "best"
    assert kept.last_path == tmp_path / "run" / "last"
    assert_weights(kept.best_path, expected[best][1])
    assert_weights(kept.last_path, expected[-1][1])


def test_larger_is_better_where_that_is_asked_for(client, tmp_path):
    def loss(output, targets):
        return F.cross_entropy(output, targets)

    kept = tg.ModelCheckpoint(tmp_path, "val_worst", mode="max")
    fit(trainer_of([kept]), 6, metrics={"worst": loss})
    losses = [loss for loss, _ in plain_epochs(6)]
    worst = losses.index(max(losses))
    assert 0 < worst < 5
    assert kept.best_epoch == worst
    assert_weights(kept.best_path, plain_epochs(6)[worst][1])


def test_a_restored_training_knows_the_best_so_far(client, tmp_path):
    expected = plain_epochs(8)
    losses = [loss for loss, _ in expected]
    best = losses.index(min(losses))
    fit(trainer_of([tg.ModelCheckpoint(tmp_path)]), best + 2)
    kept = tg.ModelCheckpoint(tmp_path)
    trainer = restored(tmp_path / "last", [kept])
    assert (kept.best, kept.best_epoch) == (pytest.approx(losses[best]), best)
    assert kept.best_path == tmp_path / "best"
    fit(trainer, 8)
    assert kept.best_epoch == best
    assert_weights(kept.best_path, expected[best][1])
    assert_weights(kept.last_path, expected[-1][1])
    # The checkpoint of the best epoch knows that it is the best.
    again = tg.ModelCheckpoint(tmp_path / "other")
    restored(tmp_path / "best", [again])
    assert again.best == kept.best
    assert again.best_path == tmp_path / "best"


def test_what_was_cut_off_between_two_saves_is_made_good(client, tmp_path):
    """A "last" that names an epoch as the best, which "best" does not have, would stay so."""
    losses = [loss for loss, _ in plain_epochs(5)]
    best = losses.index(min(losses))
    assert losses[1] > losses[0] > losses[best]
    saves = []

    class CutBetween(tg.Callback):
        def on_save(self, trainer, path):
            saves.append(path)
            if len(saves) == best + 2:  # one save an epoch, and another one of the first
                raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        fit(trainer_of([tg.ModelCheckpoint(tmp_path), CutBetween()]), 5)
    kept = tg.ModelCheckpoint(tmp_path)
    fit(restored(tmp_path / "last", [kept]), 5)
    assert kept.best_epoch == best
    assert_weights(kept.best_path, plain_epochs(5)[best][1])


def test_a_checkpoint_by_one_result_knows_the_best_by_another(client, tmp_path):
    def worst(output, targets):
        return F.cross_entropy(output, targets)

    def callbacks():
        return [
            tg.ModelCheckpoint(tmp_path / "a", "val_loss"),
            tg.ModelCheckpoint(tmp_path / "b", "val_worst", mode="max"),
        ]

    losses = [loss for loss, _ in plain_epochs(6)]
    worst_epoch = losses.index(max(losses))
    assert worst_epoch < 5
    fit(trainer_of(callbacks()), worst_epoch + 1, metrics={"worst": worst})
    a, b = again = callbacks()
    trainer = restored(tmp_path / "a" / "last", again)
    assert (a.best_epoch, b.best_epoch) == (losses.index(min(losses)), worst_epoch)
    fit(trainer, 6, metrics={"worst": worst})
    assert b.best_epoch == worst_epoch
    assert_weights(b.best_path, plain_epochs(6)[worst_epoch][1])
    with pytest.raises(ValueError, match="two ModelCheckpoint callbacks save to"):
        fit(trainer_of([tg.ModelCheckpoint(tmp_path), tg.ModelCheckpoint(tmp_path, "loss")]), 1)


def test_every_n_steps_the_state_of_that_step_is_saved(client, tmp_path, executor):
    kept = tg.ModelCheckpoint(tmp_path, every=3)
    assert [step for step in range(9) if kept.reads_state(step)] == [2, 5, 8]
    trainer = trainer_of([kept, CutOff(7)])
    with pytest.raises(RuntimeError, match="cut off"):
        trainer.fit(TRAIN * 5, progress=False)
    plain = PlainTrainer(network(), F.cross_entropy, SGD)
    plain.train((TRAIN * 5)[:6])
    assert json.loads((tmp_path / "last" / "checkpoint.json").read_text())["step"] == 6
    assert_weights(kept.last_path, plain.model.state_dict())
    assert kept.best_path is None
    assert not (tmp_path / "best").exists()


# Rows of steps and epochs


def test_rows_have_the_very_numbers_of_their_steps(client, tmp_path, executor):
    scheduler = functools.partial(StepLR, step_size=3, gamma=0.5)
    losses = []

    class Losses(tg.Callback):
        def on_step(self, trainer, loss):
            losses.append(loss.report)

    trainer = trainer_of(
        [tg.CSVLogger(tmp_path), Losses()],
        lr_scheduler=scheduler,
        clip_norm=1e6,
        param_groups={"*.bias": {"lr": 0.01}},
    )
    history = fit(trainer, 2)
    found = rows(tmp_path / "steps.csv")
    assert list(found[0]) == [
        *("step", "epoch", "loss", "learning_rate/default", "learning_rate/*.bias"),
        *("grad_norm", "bubble", "seconds"),
    ]
    assert [int(row["step"]) for row in found] == list(range(8))
    assert [int(row["epoch"]) for row in found] == [0] * 4 + [1] * 4
    for row, report in zip(found, losses, strict=True):
        for name in ("loss", "grad_norm", "bubble", "seconds"):
            assert float(row[name]) == report[name]
    for name, lr in (("default", 0.2), ("*.bias", 0.01)):
        rates = [float(row[f"learning_rate/{name}"]) for row in found]
        assert rates == [lr * 0.5 ** (step // 3) for step in range(8)]
    epochs = rows(tmp_path / "epochs.csv")
    assert list(epochs[0]) == ["epoch", "step", "loss", "val_loss"]
    assert [(int(row["epoch"]), int(row["step"])) for row in epochs] == [(0, 4), (1, 8)]
    assert [{n: float(row[n]) for n in ("loss", "val_loss")} for row in epochs] == history


def test_a_row_is_in_the_file_when_its_step_is_done(client, tmp_path):
    class Reader(tg.Callback):
        def on_step(self, trainer, loss):
            assert len(rows(tmp_path / "steps.csv")) == loss.step + 1
            assert len(scalars(tmp_path)["step/loss"]) == loss.step + 1

        def on_epoch(self, trainer, epoch, results):
            assert len(rows(tmp_path / "epochs.csv")) == epoch + 1
            assert len(scalars(tmp_path)["epoch/val_loss"]) == epoch + 1

    fit(trainer_of([tg.CSVLogger(tmp_path), tg.TensorBoardLogger(tmp_path), Reader()]), 2)


def test_losses_are_those_of_plain_torch(client, tmp_path):
    trainer = trainer_of([tg.CSVLogger(tmp_path)])
    for x, t in TRAIN:
        trainer.step(x, t)
    trainer.wait()
    plain = PlainTrainer(network(), F.cross_entropy, SGD).train(TRAIN)
    assert [float(row["loss"]) for row in rows(tmp_path / "steps.csv")] == plain
    assert {row["grad_norm"] for row in rows(tmp_path / "steps.csv")} == {""}


@pytest.mark.parametrize("cut", [5, 7], ids=["in the middle of an epoch", "at its end"])
def test_a_training_that_is_cut_off_and_restored_has_the_rows_of_an_undisturbed_one(
    client, tmp_path, cut, executor
):
    fit(trainer_of([tg.CSVLogger(tmp_path / "whole")]), 3)

    def callbacks():
        run = tmp_path / "run"
        return [tg.ModelCheckpoint(run, every=3), tg.CSVLogger(run), tg.LearningRateMonitor()]

    with pytest.raises(RuntimeError, match="cut off"):
        fit(trainer_of([*callbacks(), CutOff(cut)]), 3)
    steps = tmp_path / "run" / "steps.csv"
    written = rows(steps)
    with steps.open("a") as file:
        file.write("1")  # the row of a step from 10 on, cut off too
    again = callbacks()
    trainer = restored(tmp_path / "run" / "last", again)
    assert trainer.steps <= int(written[-1]["step"])  # there are rows of other steps
    fit(trainer, 3)
    for name in ("steps.csv", "epochs.csv"):
        assert without_times(tmp_path / "run" / name) == without_times(tmp_path / "whole" / name)
    assert again[-1].steps == list(range(12))
    assert again[-1].rates == {"default": [0.2] * 12}


def test_a_training_that_was_stopped_in_an_epoch_goes_on_in_its_rows(client, tmp_path):
    def callbacks(name):
        return [
            tg.CSVLogger(tmp_path / name),
            tg.TensorBoardLogger(tmp_path / name),
            tg.ModelCheckpoint(tmp_path / name),
        ]

    whole = callbacks("whole")[:2]
    fit(trainer_of(whole), 3)
    run = tmp_path / "run"
    fit(trainer_of([*callbacks("run"), StopAt(5)]), 3)
    assert [row["step"] for row in rows(run / "epochs.csv")] == ["4"]
    fit(restored(run / "last", callbacks("run")), 3)
    for name in ("steps.csv", "epochs.csv"):
        assert without_times(run / name) == without_times(tmp_path / "whole" / name)
    for tag in ("step/loss", "epoch/loss", "epoch/val_loss"):
        assert scalars(run)[tag] == scalars(tmp_path / "whole")[tag]


def test_an_epoch_that_the_checkpoint_has_not_seen_the_end_of_is_not_there_twice(client, tmp_path):
    run = tmp_path / "run"

    class CutAfterEpoch(tg.Callback):
        def on_epoch(self, trainer, epoch, results):
            raise RuntimeError("cut off")

    def callbacks():
        return [tg.CSVLogger(run), tg.ModelCheckpoint(run, every=len(TRAIN))]

    with pytest.raises(RuntimeError, match="cut off"):
        fit(trainer_of([*callbacks(), CutAfterEpoch()]), 2)
    assert len(rows(run / "epochs.csv")) == 1
    fit(restored(run / "last", callbacks()), 2)
    assert [row["step"] for row in rows(run / "epochs.csv")] == ["4", "8"]


def test_a_new_training_replaces_the_files_and_another_fit_goes_on(client, tmp_path):
    logger = tg.CSVLogger(tmp_path)
    fit(trainer_of([logger]), 2)
    trainer = trainer_of([logger])
    trainer.fit(TRAIN, progress=False)
    assert [row["step"] for row in rows(tmp_path / "steps.csv")] == ["0", "1", "2", "3"]
    assert [row["step"] for row in rows(tmp_path / "epochs.csv")] == ["4"]
    history = fit(trainer, 1)  # has a result more
    assert len(rows(tmp_path / "steps.csv")) == 8
    first, second = rows(tmp_path / "epochs.csv")
    assert (first["step"], first["val_loss"]) == ("4", "")
    assert (second["step"], float(second["val_loss"])) == ("8", history[0]["val_loss"])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by tag."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_the_steps_and_epochs_of_an_undisturbed_training(client, tmp_path):
    losses = []

    class Losses(tg.Callback):
        def on_step(self, trainer, loss):
            losses.append(torch.tensor(loss.item()).item())  # single precision, as in the file

    history = fit(trainer_of([tg.TensorBoardLogger(tmp_path / "whole"), Losses()]), 3)
    whole = scalars(tmp_path / "whole")
    assert whole.keys() == {
        *(f"step/{name}" for name in ("loss", "learning_rate/default", "bubble", "seconds")),
        *("epoch/loss", "epoch/val_loss"),
    }
    assert whole["step/loss"] == list(enumerate(losses))
    assert [step for step, _ in whole["epoch/val_loss"]] == [3, 7, 11]
    shown = [value for _, value in whole["epoch/val_loss"]]
    assert shown == pytest.approx([epoch["val_loss"] for epoch in history])

    run = tmp_path / "run"

    def callbacks():
        return [tg.ModelCheckpoint(run), tg.TensorBoardLogger(run / "board")]

    with pytest.raises(RuntimeError, match="cut off"):
        fit(trainer_of([*callbacks(), CutOff(6)]), 3)
    assert [step for step, _ in scalars(run / "board")["step/loss"]] == list(range(7))
    fit(restored(run / "last", callbacks()), 3)
    again = scalars(run / "board")
    for tag in ("step/loss", "step/learning_rate/default", "epoch/loss", "epoch/val_loss"):
        assert again[tag] == whole[tag], tag
    assert [step for step, _ in again["step/seconds"]] == list(range(12))
    # A new training hides all that was there.
    trainer_of([tg.TensorBoardLogger(run / "board")]).fit(TRAIN, progress=False)
    assert scalars(run / "board")["step/loss"] == whole["step/loss"][:4]


def test_tensorboard_is_asked_for_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'taskgrad\[tensorboard\]'"):
        tg.TensorBoardLogger(tmp_path)


def test_learning_rates_of_all_groups_are_kept(client):
    monitor = tg.LearningRateMonitor()
    trainer = trainer_of(
        [monitor],
        lr_scheduler=functools.partial(StepLR, step_size=1, gamma=0.5),
        param_groups={"*.bias": {"lr": 0.01}},
    )
    trainer.fit(TRAIN, progress=False)
    assert monitor.steps == [0, 1, 2, 3]
    assert monitor.rates == {
        "default": [0.2, 0.1, 0.05, 0.025],
        "*.bias": [0.01, 0.005, 0.0025, 0.00125],
    }
    # Another training, without that group, takes the place of this one.
    trainer_of([monitor]).fit(TRAIN[:2], progress=False)
    assert (monitor.steps, monitor.rates) == ([0, 1], {"default": [0.2, 0.2]})
