"""A trainer whose steps do not pay says so, once; one whose steps pay says nothing."""

from __future__ import annotations

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from taskgrad.plan.plan import Plan, PlannedWorker
from taskgrad.train.hint import Hints, hint

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def plan_of(workers: int, microbatches: int, device: str = "cpu") -> Plan:
    named = [PlannedWorker(f"tcp://w{i}", device, f"n{i}") for i in range(workers)]
    return Plan("Sequential", (), tuple(named), "1f1b", microbatches)


def report(seconds: float, *busy: float) -> dict:
    """What a step reports."""
    return {"seconds": seconds, "busy": {f"tcp://w{i}": b for i, b in enumerate(busy)}}


DOES_NOT_PAY = {  # the first four were recorded: a tiny MLP, compiled and as tasks
    "one, compiled": (plan_of(2, 1), report(0.0025, 0.0012, 0.0012), "larger batches, or fewer"),
    "one, as tasks": (plan_of(2, 1), report(0.0271, 0.0009, 0.001), "larger batches, or fewer"),
    "four": (plan_of(2, 4), report(0.0182, 0.0035, 0.005), "fewer microbatches than 4, or fewer"),
    "four, as tasks": (plan_of(2, 4), report(0.0674, 0.0021, 0.0031), "that took 0.067 s"),
    "three workers": (plan_of(3, 6), report(0.05, 0.01, 0.012, 0.011), "The 3 workers computed"),
    "just so": (plan_of(2, 4), report(1.0, 0.5, 0.45), "for 0.95 s together"),
}


@pytest.mark.parametrize(("plan", "seen", "said"), DOES_NOT_PAY.values(), ids=DOES_NOT_PAY)
def test_workers_that_one_alone_would_replace(plan, seen, said):
    found = hint([seen], plan)
    assert "one worker alone would be as fast" in found
    assert said in found
    assert ("microbatches" in found) == (plan.microbatches > 1)


def test_too_few_microbatches_for_the_workers():
    for plan, seen in (
        (plan_of(2, 1), report(0.303, 0.1517, 0.1537)),  # recorded: linear layers of 1,024
        (plan_of(2, 1), report(0.3313, 0.1425, 0.1644)),  # as tasks
        (plan_of(4, 2), report(1.0, 0.41, 0.4, 0.42, 0.39)),
        (plan_of(4, 1), report(1.0, 0.24, 0.25, 0.26, 0.25)),
    ):
        found = hint([seen], plan)
        assert f"microbatch{'es are' if plan.microbatches > 1 else ' is'} few for them" in found
        assert "one worker alone" not in found


def test_a_worker_for_which_the_others_wait_is_named():
    found = hint([report(1.0, 0.05, 0.1, 0.92)], plan_of(3, 6))
    assert "worker n2 (tcp://w2) did 86% of its work" in found
    assert "placement=" in found
    recorded = report(0.7617, 0.2353, 0.7349)  # eight linear layers, seven of them on one worker
    assert "worker n1 (tcp://w1) did 76% of its work" in hint([recorded], plan_of(2, 8))


PAYS = {  # the first four were recorded
    "linear": (plan_of(2, 4), report(0.3345, 0.2578, 0.2754)),
    "as tasks": (plan_of(2, 4), report(0.4145, 0.2857, 0.2606)),
    "one to three": (plan_of(2, 4), report(0.3363, 0.111, 0.3002)),
    "the same as tasks": (plan_of(2, 4), report(0.3751, 0.1167, 0.2931)),
    "uneven": (plan_of(2, 4), report(1.0, 0.95, 0.55)),
    "four workers": (plan_of(4, 8), report(1.0, 0.7, 0.68, 0.72, 0.69)),
    "as many as workers": (plan_of(4, 4), report(1.0, 0.55, 0.54, 0.56, 0.57)),
    "slow network": (plan_of(4, 8), report(1.0, 0.4, 0.4, 0.4, 0.4)),
    "one worker": (plan_of(1, 1), report(1.0, 0.2)),
    "on a GPU": (plan_of(2, 4, "cuda:0"), report(1.0, 0.01, 0.01)),
}


@pytest.mark.parametrize(("plan", "seen"), PAYS.values(), ids=PAYS)
def test_a_run_that_pays_is_let_be(plan, seen):
    assert hint([seen], plan) is None
    assert hint([], plan) is None


def test_one_step_in_the_middle_decides():
    usual, odd = report(1.0, 0.8, 0.8), report(50.0, 0.8, 0.8)
    assert hint([usual, odd, usual], plan_of(2, 4)) is None
    assert hint([odd, usual, odd], plan_of(2, 4)) is not None


def hints_in(caplog) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "taskgrad"]
    return [text for text in found if "When not to use it" in text]


def test_the_first_steps_do_not_count_and_there_is_one_hint(caplog):
    hints = Hints(lambda microbatches: plan_of(2, microbatches))
    tiny, big = report(0.084, 0.002, 0.002), report(1.0, 0.9, 0.9)
    for seen, count in ((report(9.0, 0.1, 0.1), 3), (tiny, 9)):
        for _ in range(count):
            hints.note(seen, 4)
    hints.note(tiny, 3)  # a smaller last batch has another plan
    assert hints_in(caplog) == []
    hints.note(tiny, 4)
    assert len(hints_in(caplog)) == 1
    for _ in range(50):
        hints.note(tiny, 4)
    assert len(hints_in(caplog)) == 1

    caplog.clear()
    hints = Hints(lambda microbatches: plan_of(2, microbatches))
    for seen in [big] * 13 + [tiny] * 50:
        hints.note(seen, 4)
    assert hints_in(caplog) == []


class Sleep(nn.Module):
    """Computes for a given time, whatever else the machine does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        time.sleep(self.seconds)
        return x * self.weight


def test_workers_that_wait_for_each_other_are_told_once(client, executor, caplog):
    chain = tg.GraphChain(nn.Sequential(Sleep(0.02), Sleep(0.02)), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    x, y = torch.randn(16, 1), torch.randn(16, 1)
    for _ in range(12):
        trainer.step(x, y)
    trainer.wait()
    assert hints_in(caplog) == []
    for _ in range(20):
        trainer.step(x, y)
    trainer.wait()
    [said] = hints_in(caplog)
    assert "The 2 workers computed" in said


@pytest.mark.long
def test_workers_that_compute_at_once_are_told_nothing(client, executor, caplog):
    chain = tg.GraphChain(nn.Sequential(Sleep(0.08), Sleep(0.08)), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=4, schedule="gpipe")
    x, y = torch.randn(16, 1), torch.randn(16, 1)
    for _ in range(14):
        loss = trainer.step(x, y)
    trainer.wait()
    assert sum(loss.report["busy"].values()) > 0
    assert hints_in(caplog) == []
