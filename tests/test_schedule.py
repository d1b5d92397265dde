"""Schedules are data: complete, possible, and with the peaks that they promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgrad.plan.schedule import NAMES, Action, Pipeline, Schedule, check, schedule


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


@given(pipelines(), st.integers(1, 9), st.sampled_from(NAMES))
def test_every_schedule_is_complete_and_can_be_carried_out(pipeline, microbatches, name):
    found = schedule(name, pipeline, microbatches)
    check(found)
    for order in found.orders:  # the order in which plain torch adds gradients
        for kind in "FB":
            for stage in range(len(pipeline.workers)):
                passing = [a.microbatch for a in order if (a.kind, a.stage) == (kind, stage)]
                assert passing == sorted(passing)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 16])
def test_peaks(stages, microbatches):
    line = Pipeline.line(stages)
    assert schedule("gpipe", line, microbatches).peak_tapes() == (microbatches,) * stages
    peaks = schedule("1f1b", line, microbatches).peak_tapes()
    assert peaks == tuple(min(stages - i, microbatches) for i in range(stages))


def test_1f1b_is_the_published_one():
    found = schedule("1f1b", Pipeline.line(4), 8)
    assert str(found).splitlines()[0] == (
        "0: F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 F0.6 B0.3 F0.7 B0.4 B0.5 B0.6 B0.7"
    )


def changed(orders) -> Schedule:
    return Schedule("own", Pipeline.line(2), 1, orders)


F, B = (lambda stage, kind=kind: Action(kind, stage, 0) for kind in "FB")


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (((F(0),), (F(1), B(1))), "B0.0 is missing"),
        (((F(0), F(0), B(0)), (F(1), B(1))), "stands twice"),
        (((F(0), B(0), F(1)), (B(1),)), "in the order of worker 0"),
        (((B(0), F(0)), (F(1), B(1))), "waits for ever at B0.0, F1.0"),
    ],
)
def test_check_says_what_is_wrong(orders, message):
    with pytest.raises(ValueError, match=message):
        check(changed(orders))


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match="need each other"):
        schedule("gpipe", Pipeline((0, 1), ((1,), (0,))), 1)
    with pytest.raises(ValueError, match="'zigzag'; there are 'gpipe', '1f1b'"):
        schedule("zigzag", Pipeline.line(2), 2)
    with pytest.raises(ValueError, match="at least one microbatch"):
        schedule("gpipe", Pipeline.line(2), 0)
