"""A fit that was interrupted goes on in the epoch and at the batch where it stopped."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import taskgrad as tg
from helpers import assert_same, long_rows

ADAM = torch.optim.Adam


class Noisy(Dataset):
    """Samples with noise from the random states of the process.

    Python's own is drawn from by Dask's threads, too, but in a loader's worker process.
    """

    def __len__(self):
        return 40

    def __getitem__(self, i):
        noise = torch.randn(6) + float(np.random.rand())
        if torch.utils.data.get_worker_info() is not None:
            noise = noise + random.random()
        return noise + i / 40, i % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))


def seed():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def trainer_of(client, folder=None, **options):
    chain = tg.GraphChain(net(), client=client, placement=[0, 0, 1, 1])
    if folder is not None and (folder / "checkpoint.json").exists():
        return tg.Trainer.restore(folder, chain, F.cross_entropy, ADAM, **options)
    return tg.Trainer(chain, F.cross_entropy, ADAM, microbatches=2, **options)


class Saves(tg.Callback):
    """Saves after some steps; ends the fit, or the process, after another."""

    def __init__(self, folder, steps, end=None, how=tg.Trainer.stop):
        self.folder, self.saved, self.end, self.how = folder, steps, end, how

    def reads_state(self, step):
        return step in self.saved

    def on_step(self, trainer, loss):
        if loss.step in self.saved:
            trainer.save(self.folder)
        if loss.step == self.end:
            self.how(trainer)


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "a generator": lambda: DataLoader(
        Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "a worker process": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1),
    "a list": lambda: [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(10)],
}


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("shuffled", 14),
        *long_rows(
            ("shuffled", 0),
            ("shuffled", 6),
            ("a generator", 9),
            ("a generator", 19),
            ("a worker process", 6),
            ("a worker process", 10),
            ("a list", 9),
        ),
    ],
)
def test_a_fit_goes_on_where_it_was_saved(client, tmp_path, kind, saved):
    seed()
    given = LOADERS[kind]()
    validation = [(torch.randn(4, 6), torch.randint(3, (4,)))]
    seed()
    whole = trainer_of(client)
    history = whole.fit(given, epochs=2, val_loader=validation, progress=False)
    expected = whole.chain.state_dict()

    seed()
    given = LOADERS[kind]()
    seed()
    begun = trainer_of(client, callbacks=[Saves(tmp_path / "c", {saved}, saved + 1)])
    begun.fit(given, epochs=2, val_loader=validation, progress=False)

    torch.manual_seed(99)  # another process has other random states
    random.seed(99)
    np.random.seed(99)
    given = given if kind == "a list" else LOADERS[kind]()
    again = trainer_of(client, tmp_path / "c")
    assert again.steps == saved + 1
    found = again.fit(given, epochs=2, val_loader=validation, progress=False)
    assert again.steps == 20
    for name, value in expected.items():
        assert_same(again.chain.state_dict()[name], value, name)
    assert found == history
    assert len(again.fit(given, epochs=1, progress=False)) == 1  # and then a new one


def test_the_bar_goes_on_too(client, tmp_path, capsys):
    given = LOADERS["a list"]()
    trainer_of(client, callbacks=[Saves(tmp_path / "c", {13}, 14)]).fit(given, 2, progress=False)
    again = trainer_of(client, tmp_path / "c")
    again.fit(given, epochs=2, val_loader=given)
    shown = capsys.readouterr().err
    assert "epoch 2/2:  40%" in shown
    assert "epoch 1/2" not in shown
    assert "val_loss" in shown


@pytest.mark.long
def test_a_finished_fit_is_not_begun_again(client, tmp_path):
    class SavesAtTheEnd(tg.Callback):
        def on_fit_end(self, trainer, history):
            trainer.save(tmp_path / "c")

    given = LOADERS["a list"]()
    history = trainer_of(client, callbacks=[SavesAtTheEnd()]).fit(given, 2, progress=False)
    again = trainer_of(client, tmp_path / "c")
    assert again.fit(given, 2, progress=False) == history
    assert again.steps == 20
    longer = trainer_of(client, tmp_path / "c")
    assert longer.fit(given, 3, progress=False)[:2] == history
    assert longer.steps == 30


@pytest.mark.long
def test_a_fit_that_was_stopped_is_saved_after_it(client, tmp_path):
    """As a signal handler and a line after `fit` have it."""
    given = LOADERS["a list"]()
    whole = trainer_of(client)
    history = whole.fit(given, 2, progress=False)
    stopped = trainer_of(client, callbacks=[Saves(tmp_path / "c", set(), 12)])
    assert len(stopped.fit(given, 2, progress=False)) == 2
    stopped.save(tmp_path / "c")
    again = trainer_of(client, tmp_path / "c")
    assert again.fit(given, 2, progress=False) == history
    for name, value in whole.chain.state_dict().items():
        assert_same(again.chain.state_dict()[name], value, name)


def test_a_fit_that_was_interrupted_is_saved_after_it(client, tmp_path):
    class Interrupts(tg.Callback):
        def on_step(self, trainer, loss):
            if loss.step == 13:
                raise KeyboardInterrupt

    given = LOADERS["a list"]()
    whole = trainer_of(client)
    history = whole.fit(given, 2, progress=False)
    stopped = trainer_of(client, callbacks=[Interrupts()])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(given, 2, progress=False)
    stopped.save(tmp_path / "c")
    again = trainer_of(client, tmp_path / "c")
    assert 14 <= again.steps <= 15
    found = again.fit(given, 2, progress=False)
    assert found[0] == history[0]
    assert len(found) == 2  # the loss of a step that was cut off is not in the second mean
    for name, value in whole.chain.state_dict().items():
        assert_same(again.chain.state_dict()[name], value, name)


@pytest.mark.long
def test_a_step_in_between_begins_a_new_fit(client, tmp_path):
    given = LOADERS["a list"]()
    trainer_of(client, callbacks=[Saves(tmp_path / "c", {4}, 5)]).fit(given, 2, progress=False)
    again = trainer_of(client, tmp_path / "c")
    again.step(*given[0])
    assert len(again.fit(given, 1, progress=False)) == 1
    assert again.steps == 5 + 1 + 10


def test_a_loader_that_cannot_be_repeated_is_said_to_be(client, tmp_path):
    def unseeded():
        generator = torch.Generator()
        generator.seed()
        for _ in range(10):
            yield torch.randn(4, 6, generator=generator), torch.zeros(4, dtype=torch.long)

    fit = trainer_of(client, callbacks=[Saves(tmp_path / "c", {4}, 5)]).fit
    fit(unseeded(), progress=False)
    again = trainer_of(client, tmp_path / "c")
    with pytest.warns(UserWarning, match="cannot be repeated: batch 4 of epoch 0"):
        again.fit(unseeded(), progress=False)
    short = trainer_of(client, tmp_path / "c")
    with pytest.raises(ValueError, match=r"5 batches of this epoch .* yields 2"):
        short.fit(LOADERS["a list"]()[:2], progress=False)


class Stateful:
    """A loader with a state, as torchdata's; `read` counts the batches that were made."""

    def __init__(self):
        self.at, self.read = 0, 0

    def __len__(self):
        return 10

    def __iter__(self):
        start, self.at = self.at, 0
        for i in range(start, 10):
            self.read += 1
            generator = torch.Generator().manual_seed(i)
            self.at = i + 1
            yield torch.randn(4, 6, generator=generator), torch.full((4,), i % 3)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_loader_with_a_state_skips_nothing(client, tmp_path):
    whole = trainer_of(client)
    whole.fit(Stateful(), 2, progress=False)
    trainer_of(client, callbacks=[Saves(tmp_path / "c", {16}, 17)]).fit(
        Stateful(), 2, progress=False
    )
    given = Stateful()
    again = trainer_of(client, tmp_path / "c")
    again.fit(given, 2, progress=False)
    assert given.read == 3
    for name, value in whole.chain.state_dict().items():
        assert_same(again.chain.state_dict()[name], value, name)


@pytest.mark.long
def test_samplers_hear_of_the_epoch(client):
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    data = Noisy()
    loader = DataLoader(data, 4, sampler=Sampler(data))
    trainer_of(client).fit(loader, 3, progress=False)
    assert Sampler.epochs == [0, 1, 2]


class Counts(tg.Callback):
    def __init__(self):
        self.seen = 0

    def on_step(self, trainer, loss):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen, "tensor": torch.tensor([self.seen])}

    def load_state_dict(self, state):
        assert state["tensor"].tolist() == [state["seen"]]
        self.seen = state["seen"]


def test_callbacks_keep_their_state(client, tmp_path):
    given = LOADERS["a list"]()
    counts = [Counts(), Counts()]
    counts[1].seen = 100
    trainer = trainer_of(client, callbacks=[*counts, Saves(tmp_path / "c", {4})])
    trainer.fit(given, progress=False)
    other, fresh = [Counts(), Counts()], Counts()
    again = trainer_of(client, tmp_path / "c", callbacks=[*other, fresh])
    assert [c.seen for c in other] == [5, 105]
    assert fresh.seen == 0
    again.fit(given, progress=False)
    assert [c.seen for c in other] == [10, 110]


# -- processes that are killed -------------------------------------------------------------------


def run_job(folder, killed_at):
    """What a preemptible job does: the same command every time."""
    folder = Path(folder)
    client = tg.local_cluster(n_workers=2, dashboard_address=":0")
    seed()
    kill = Saves(folder / "c", set(range(2, 30, 3)), killed_at, lambda _: os.kill(os.getpid(), 9))
    trainer = trainer_of(client, folder / "c", callbacks=[kill])
    history = trainer.fit(DataLoader(Noisy(), 4, shuffle=True), epochs=3, progress=False)
    digest = hashlib.sha256()
    for value in trainer.chain.state_dict().values():
        digest.update(value.numpy().tobytes())
    (folder / "result.json").write_text(json.dumps([digest.hexdigest(), history]))
    client.close()


@pytest.mark.long
def test_a_job_that_is_killed_three_times_ends_as_if_it_was_not(tmp_path):
    def run(folder, killed_at):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, __file__, str(folder), str(killed_at)]
        return subprocess.run(command, timeout=120, check=False).returncode

    for killed_at in (7, 16, 24):  # in mid-epoch, with steps that are not saved
        assert run(tmp_path / "killed", killed_at) == -signal.SIGKILL
    assert run(tmp_path / "killed", -1) == 0
    assert run(tmp_path / "whole", -1) == 0
    results = [(tmp_path / which / "result.json").read_text() for which in ("killed", "whole")]
    assert results[0] == results[1]


if __name__ == "__main__":
    run_job(sys.argv[1], int(sys.argv[2]))
