"""Schedules are data: complete, possible, with their peaks of tapes and their times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgrad.plan.rules import NAMES, schedule
from taskgrad.plan.schedule import Action, Costs, Pipeline, Schedule, check


@st.composite
def pipelines(draw) -> Pipeline:
    """Any graph of up to six stages, over up to four workers."""
    n = draw(st.integers(1, 6))
    names = [draw(st.integers(0, 3)) for _ in range(n)]
    known = list(dict.fromkeys(names))
    needs = [()] + [
        tuple(sorted(draw(st.sets(st.integers(0, i - 1), min_size=1)))) for i in range(1, n)
    ]
    return Pipeline(tuple(map(known.index, names)), tuple(needs))


@st.composite
def uneven_costs(draw, stages: int) -> Costs:
    """Costs of every action, some of them nothing."""
    times = st.lists(st.integers(0, 9).map(lambda n: n / 4), min_size=stages, max_size=stages)
    latency = draw(st.sampled_from([0.0, 0.25, 3.0]))
    return Costs(*(tuple(draw(times)) for _ in range(3)), latency=latency)


@given(pipelines(), st.integers(1, 9), st.sampled_from(NAMES), st.data())
def test_a_timeline_is_as_tight_as_can_be(pipeline, microbatches, name, data):
    costs = data.draw(uneven_costs(len(pipeline.workers)))
    found = schedule(name, pipeline, microbatches)
    timeline = found.timeline(costs)
    assert tuple(tuple(s.action for s in row) for row in timeline.rows) == found.orders
    ends = {span.action: span.end for row in timeline.rows for span in row}
    for worker, row in enumerate(timeline.rows):
        free = 0.0
        for (kind, stage, m), start, end in row:
            if kind == "F":
                before = [Action("F", s, m) for s in pipeline.needs[stage]]
            elif kind == "B":
                users = [u for u, needs in enumerate(pipeline.needs) if stage in needs]
                before = [Action("F", stage, m), *(Action("B", s, m) for s in users)]
            else:
                before = [Action("B", stage, m)]
            there = [
                ends[b] + (costs.latency if pipeline.workers[b.stage] != worker else 0)
                for b in before
            ]
            assert start == max(free, 0, *there)
            b = costs.backward[stage]
            lengths = {"F": costs.forward[stage], "W": costs.weight[stage]}
            lengths["B"] = b if (stage, m) in found.split else b + costs.weight[stage]
            free = end
            assert end == start + lengths[kind]
    assert 0 <= found.bubble(costs) <= found.bubble(costs, flush=True) <= 1
    assert timeline.period <= timeline.duration


def test_costs_are_of_every_stage():
    with pytest.raises(ValueError, match="costs of 3 stages, and 2 stages"):
        schedule("1f1b", Pipeline.line(2), 2).timeline(Costs.uniform(3))


def test_a_schedule_that_cannot_be_carried_out_has_no_timeline():
    with pytest.raises(ValueError, match=r"waits for ever at B0\.0, F1\.0"):
        changed(((B(0), F(0)), (F(1), B(1)))).timeline(Costs.uniform(2))


def test_a_tape_is_used_up_by_w():
    found = changed(((F(0), B(0), W(0)), (F(1), B(1))))
    assert found.split == {(0, 0)}
    two = Schedule("own", Pipeline.line(1), 2, (actions("F0 B0 F1 B1 W0 W1"),))
    assert two.peak_tapes() == (2,)
    whole = Schedule("own", Pipeline.line(1), 2, (actions("F0 B0 F1 B1"),))
    assert whole.peak_tapes() == (1,)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 16])
def test_peaks(stages, microbatches):
    line = Pipeline.line(stages)
    assert schedule("gpipe", line, microbatches).peak_tapes() == (microbatches,) * stages
    peaks = schedule("1f1b", line, microbatches).peak_tapes()
    assert peaks == tuple(min(stages - i, microbatches) for i in range(stages))


def changed(orders) -> Schedule:
    return Schedule("own", Pipeline.line(2), 1, orders)


F, B, W = (lambda stage, kind=kind: Action(kind, stage, 0) for kind in "FBW")


def actions(text: str) -> tuple[Action, ...]:
    """Actions of stage 0."""
    return tuple(Action(word[0], 0, int(word[1:])) for word in text.split())


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (((F(0),), (F(1), B(1))), "B0.0 is missing"),
        (((F(0), F(0), B(0)), (F(1), B(1))), "stands twice"),
        (((F(0), B(0), F(1)), (B(1),)), "in the order of worker 0"),
        (((B(0), F(0)), (F(1), B(1))), "waits for ever at B0.0, F1.0"),
        (((F(0), B(0)), (F(1), W(1), B(1))), r"waits for ever at B0\.0, W1\.0"),
        (((F(0), B(0), W(0), W(0)), (F(1), B(1))), r"W0\.0 of worker 0 .* stands twice"),
        (((F(0), B(0)), (F(1), W(1))), r"B1\.0 is missing"),
        (((F(0), B(0)), (F(1), B(1), W(0))), r"W0\.0 stands in the order of worker 1"),
    ],
)
def test_check_says_what_is_wrong(orders, message):
    with pytest.raises(ValueError, match=message):
        check(changed(orders))
