"""Ctrl-C at any place of a step: it is taken or not, no bit changes, and nothing hangs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType

import dask
import pytest
import torch
import torch.nn.functional as F

import taskgrad as tg
from conftest import wait_until
from helpers import long, long_rows
from plain import ConvNet, PlainTrainer, images
from test_imap import nothing_left

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
# What this thread runs of ours, and of the standard library below it. Dask has its own faults.
STANDARD = (threading, contextlib, concurrent.futures._base)
FILES = (str(Path(tg.__file__).parent), *(module.__file__ for module in STANDARD))


class Interrupts:
    """Raise KeyboardInterrupt in this thread, as often as there are `gaps`, and count the places.

    Before each as many places are passed by. They are those where CPython looks for signals: a
    function of Python's begins, or one of C's returns.
    """

    def __init__(self, *gaps: int) -> None:
        self.left = list(gaps)
        self.passed = 0

    def __enter__(self) -> Interrupts:
        sys.setprofile(self._place)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)

    def _place(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(FILES):
            self.passed += 1
            if self.left and self.passed > self.left[0]:
                self.passed = 0
                self.left.pop(0)
                raise KeyboardInterrupt


@pytest.fixture
def hangs_are_noticed():
    with dask.config.set({"taskgrad.answer-deadline": "20s"}):
        yield


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("hangs_are_noticed")
@pytest.mark.parametrize(
    ("executor", "again", "stride"),
    [
        ("compiled", False, 40),
        ("futures", False, 300),
        *long_rows(
            ("compiled", False, 1),
            ("compiled", True, 3),
            ("futures", False, 11),
            ("futures", True, 29),
        ),
    ],
)
def test_ctrl_c_anywhere_in_a_step(client, monkeypatch, executor, again, stride):
    """Also `again`, while the first is dealt with; then the step is taken, unless it was."""
    rng = random.Random(0)
    chain = tg.GraphChain(ConvNet(), client=client, placement=[0] * 5 + [1] * 5)
    trainer = tg.Trainer(chain, F.cross_entropy, ADAMW, executor=executor, microbatches=2)
    plain = PlainTrainer(ConvNet(), F.cross_entropy, ADAMW, microbatches=2)
    [(x, y)] = images(1)
    assert trainer.step(x, y).item() == plain.train([(x, y)])[0]
    for at in range(0, 10**6, stride):
        expected, steps = plain.train([(x, y)])[0], trainer.steps
        gaps = [at, rng.randrange(1000)] if again else [at]
        # As workers that are busy: Ctrl-C does not wait for them for long.
        monkeypatch.setattr("taskgrad.train.steps._INTERRUPT_S", rng.choice([0.0, 0.5]))
        loss = None
        with contextlib.suppress(KeyboardInterrupt), Interrupts(*gaps) as interrupts:
            loss = trainer.step(x, y)
            loss.item()
        if len(interrupts.left) == len(gaps):
            break  # it has fewer places
        if loss is not None:
            with contextlib.suppress(KeyboardInterrupt):
                assert loss.item() == expected
        if trainer.steps == steps:
            assert trainer.step(x, y).item() == expected
        assert trainer.steps == steps + 1
        ours, wanted = chain.state_dict(), plain.model.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert at > 500


def slowly(x: int) -> int:
    time.sleep(0.01)
    return x


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("hangs_are_noticed")
@pytest.mark.parametrize("stride", [29, *long(1)])
def test_ctrl_c_anywhere_in_a_stream(client, stride):
    """The stream goes on where it was, or has ended; nothing else is raised."""
    for at in range(0, 10**6, stride):
        results = tg.imap(slowly, range(8), chunksize=2, client=client)
        found = [next(results)]  # its thread has started, which Python does not do safely
        try:
            with Interrupts(at) as interrupts:
                for result in results:
                    found.append(result)
        except KeyboardInterrupt:
            found += results
        assert found == list(range(len(found)))
        results.close()
        if interrupts.left:
            break  # it has fewer places
    assert at > 100
    assert wait_until(lambda: nothing_left(client))
