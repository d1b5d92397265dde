"""A plan is data: it prints, compares, goes through JSON; and it is what a trainer runs."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from taskgrad.executors.compiled import CompiledExecutor
from taskgrad.executors.futures import FuturesExecutor
from taskgrad.graph.calls import Call
from taskgrad.graph.pullback import Pullback, WeightPullback
from taskgrad.plan.plan import Plan, PlannedWorker, Stage
from taskgrad.plan.rules import NAMES, schedule
from taskgrad.plan.schedule import UPDATE, Action, Pipeline, Schedule, check
from tests.test_schedule import pipelines

SGD = partial(torch.optim.SGD, lr=0.1)


def planned(pipeline: Pipeline, name: str, microbatches: int) -> Plan:
    stages = tuple(
        Stage(f"s{i}", (i,), (f"layer {i}",), worker, needs)
        for i, (worker, needs) in enumerate(zip(pipeline.workers, pipeline.needs, strict=True))
    )
    workers = tuple(PlannedWorker(f"tcp://w{i}", "cpu") for i in range(max(pipeline.workers) + 1))
    return Plan("Net", stages, workers).with_schedule(schedule(name, pipeline, microbatches))


@given(pipelines(), st.integers(1, 5), st.sampled_from(NAMES), st.none() | st.floats(0, 1e6))
def test_a_plan_goes_through_json_unchanged(pipeline, microbatches, name, cost):
    plan = Plan(**{**vars(planned(pipeline, name, microbatches)), "cost": cost})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert again.pipeline == pipeline


def test_plans_differ_where_anything_does():
    plan = planned(Pipeline.line(2), "1f1b", 2)
    assert plan == planned(Pipeline.line(2), "1f1b", 2)
    assert plan != planned(Pipeline.line(2), "1f1b", 3)
    assert plan != planned(Pipeline.line(2), "gpipe", 2)
    assert plan != Plan(**{**vars(plan), "cost": 1.0})
    elsewhere = (PlannedWorker("tcp://x", "cpu"), plan.workers[1])
    assert plan != Plan(**{**vars(plan), "workers": elsewhere})
    assert plan.with_schedule(schedule("gpipe", Pipeline.line(2), 2)).microbatches == 2


def test_a_plan_prints_what_runs_where():
    plan = planned(Pipeline((0, 1, 0), ((), (0,), (0, 1))), "gpipe", 1)
    assert str(plan).splitlines() == [
        "Plan of Net: 3 stages on 2 workers, 1 microbatches, gpipe",
        "stage 0: layers s0, on tcp://w0, cpu, of the batch",
        "stage 1: layers s1, on tcp://w1, cpu, of stage 0",
        "stage 2: layers s2, on tcp://w0, cpu, of stage 0, stage 1",
        "tcp://w0: F0.0 F2.0 BW2.0 BW0.0 U",
        "tcp://w1: F1.0 BW1.0 U",
    ]
    assert ", 0.25 s predicted" in str(Plan(**{**vars(plan), "cost": 0.25}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": 1}', '{"stages": [{"a": 1}]}'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json(text)


def test_an_action_that_nobody_knows_is_refused():
    text = planned(Pipeline.line(1), "1f1b", 1).to_json()
    with pytest.raises(ValueError, match=r"no action: 'Z0\.0'"):
        Plan.from_json(text.replace("F0.0", "Z0.0"))


def test_a_schedule_of_other_stages_is_refused():
    with pytest.raises(ValueError, match="the schedule is of"):
        planned(Pipeline.line(2), "1f1b", 1).with_schedule(schedule("1f1b", Pipeline.line(3), 1))


# A worker takes the gradients for weights after those that others wait for.
SPLIT = Schedule(
    "split",
    Pipeline.line(2),
    1,
    (
        (Action("F", 0, 0), Action("B", 0, 0), Action("W", 0, 0)),
        (Action("F", 1, 0), Action("B", 1, 0), Action("W", 1, 0)),
    ),
)


def test_a_backward_for_weights_alone_is_an_action():
    check(SPLIT)
    assert SPLIT.peak_tapes() == (1, 1)
    plan = planned(Pipeline.line(2), "1f1b", 1).with_schedule(SPLIT)
    assert str(plan).splitlines()[-1] == "tcp://w1: F1.0 B1.0 W1.0 U"
    assert Plan.from_json(plan.to_json()) == plan
    first, last = SPLIT.orders
    with pytest.raises(ValueError, match=r"waits for ever at W0\.0"):
        check(Schedule("", SPLIT.pipeline, 1, ((first[0], first[2], first[1]), last)))
    both = (Action("F", 0, 0), Action("BW", 0, 0))
    check(Schedule("", SPLIT.pipeline, 1, (both, last)))
    with pytest.raises(ValueError, match=r"B0\.0 of worker 0 is unknown, or stands twice"):
        check(Schedule("", SPLIT.pipeline, 1, ((*both, Action("B", 0, 0)), last)))
    with pytest.raises(ValueError, match="U of worker 0 is unknown"):
        check(Schedule("", SPLIT.pipeline, 1, ((*both, UPDATE), last)))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(3, 3) for _ in range(4)))


def launched(monkeypatch) -> list[dict]:
    """What steps submit: for each call and pullback the one that it is to wait for."""
    found = []

    def note(self, targets, order):
        found.append(order)
        return launch(self, targets, order)

    launch = FuturesExecutor.launch
    monkeypatch.setattr(FuturesExecutor, "launch", note)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_runs_what_its_plan_says(client, monkeypatch, name):
    chain = tg.GraphChain(Net(), client=client, placement=[0, 1, 1, 0])
    options = {"microbatches": 3, "schedule": name, "executor": "futures"}
    trainer = tg.Trainer(chain, F.mse_loss, SGD, **options)
    plan = trainer.plan
    assert [stage.layers for stage in plan.stages] == [(0,), (1, 2), (3,)]
    assert [stage.names for stage in plan.stages] == [("0",), ("1", "2"), ("3",)]
    assert [stage.inputs for stage in plan.stages] == [(), (0,), (1,)]
    at = [plan.workers[stage.worker].address for stage in plan.stages]
    assert at == [chain.placement[i].worker for i in (0, 1, 3)]
    assert [worker.device for worker in plan.workers] == ["cpu", "cpu"]
    assert plan.schedule == name
    assert plan.microbatches == 3
    assert all(order[-1] == UPDATE for order in plan.orders)

    submitted = launched(monkeypatch)
    x, y = torch.ones(6, 3), torch.zeros(6, 3)
    trainer.step(x, y).item()
    [awaits] = submitted
    calls = {n for n in {*awaits, *itertools.chain(*awaits.values())} if isinstance(n, Call)}
    assert len(calls) == 9
    in_order = sorted(calls, key=lambda call: call.order)
    stage_of = {c: (i % 3, c.spec.draw.microbatch) for i, c in enumerate(in_order)}

    split = any(a.kind == "W" for order in plan.orders for a in order)

    def action(node) -> Action:
        if isinstance(node, Call):
            return Action("F", *stage_of[node])
        if isinstance(node, WeightPullback):
            return Action("W", *stage_of[node.awaits[0].call])
        return Action("B" if split else "BW", *stage_of[node.call])

    assert {action(node): tuple(map(action, before)) for node, before in awaits.items()} == {
        then: (before,) for *order, _ in plan.orders for before, then in itertools.pairwise(order)
    }


@pytest.mark.parametrize("name", NAMES)
def test_programs_are_in_the_order_of_the_plan(client, monkeypatch, name):
    loaded = []

    def note(self, number, lowered):
        loaded.append(lowered)
        return load(self, number, lowered)

    load = CompiledExecutor.load
    monkeypatch.setattr(CompiledExecutor, "load", note)
    chain = tg.GraphChain(Net(), client=client, placement=[0, 1, 1, 0])
    options = {"microbatches": 3, "schedule": name, "executor": "compiled"}
    trainer = tg.Trainer(chain, F.mse_loss, SGD, **options)
    for _ in range(3):
        trainer.step(torch.ones(6, 3), torch.zeros(6, 3)).item()
    [lowered] = loaded  # once
    for order, program in zip(trainer.plan.orders, lowered.programs, strict=True):
        ran = [i.value.operation for i in program.program.instructions if i.kind == "run"]
        actions = [str(action) for action in order if action.kind != "U"]
        assert ran[: len(actions)] == actions
        assert sum(name.startswith("update") for name in ran[len(actions) :]) == 1


def test_the_plan_has_no_backward_where_nothing_is_trained(client):
    model = Net()
    model[0].requires_grad_(False)
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=2)
    assert [stage.trained for stage in trainer.plan.stages] == [False, True]
    assert str(trainer.plan).splitlines()[-2].endswith(": F0.0 F0.1 U")
    assert trainer.step(torch.ones(4, 3), torch.zeros(4, 3)).item() > 0


def test_a_trainers_plan_goes_through_json(client):
    trainer = tg.Trainer(tg.GraphChain(Net(), client=client), F.mse_loss, SGD, microbatches=2)
    assert Plan.from_json(trainer.plan.to_json()) == trainer.plan


def test_a_trainer_runs_weights_alone(client, monkeypatch):
    submitted = launched(monkeypatch)
    chain = tg.GraphChain(Net(), client=client, placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD, schedule=lambda pipeline, n: SPLIT)
    assert [trainer.step(torch.ones(4, 3), torch.zeros(4, 3)).item() for _ in range(2)]
    assert str(trainer.plan).splitlines()[-2].endswith(": F0.0 B0.0 W0.0 U")
    for order in submitted:
        awaited = [node.awaits[0] for node in order if isinstance(node, WeightPullback)]
        assert [type(pullback) for pullback in awaited] == [Pullback, Pullback]


def test_auto_is_the_shortest_step_at_the_memory_of_1f1b(client):
    chain = tg.GraphChain(Net(), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=4, schedule="auto")
    assert trainer.plan.schedule == "zb_h1"
    assert trainer.step(torch.ones(8, 3), torch.zeros(8, 3)).item() > 0
    alone = tg.GraphChain(Net(), client=client, placement=[0] * 4)
    trainer = tg.Trainer(alone, F.mse_loss, SGD, microbatches=4, schedule="auto")
    assert trainer.plan.schedule == "1f1b"  # GPipe has four tapes, and the others are as long


def test_a_small_batch_takes_a_step_of_fewer_microbatches(client, monkeypatch):
    chain = tg.GraphChain(Net(), client=client)
    trainer = tg.Trainer(chain, F.mse_loss, SGD, microbatches=4, executor="futures")
    submitted = launched(monkeypatch)
    trainer.step(torch.ones(2, 3), torch.zeros(2, 3)).item()
    [awaits] = submitted
    calls = {n for n in {*awaits, *itertools.chain(*awaits.values())} if isinstance(n, Call)}
    assert {call.spec.draw.microbatch for call in calls} == {0, 1}
    assert trainer.plan.microbatches == 4
