"""The named schedules: what each promises of order, tapes and bubble, on any graph of stages."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgrad.plan.ordering import Rule, carry_out, oldest_first
from taskgrad.plan.rules import _RULES, NAMES, drawing, fastest, schedule
from taskgrad.plan.schedule import Action, Costs, Pipeline, Schedule, check
from tests.test_schedule import pipelines, uneven_costs

WHOLE = ("gpipe", "1f1b", "interleaved_1f1b")
SPLIT = ("zb_h1", "zb_h2", "zb_v")


def line(workers) -> Pipeline:
    """Stages one after the other, on these workers."""
    return Pipeline(tuple(workers), Pipeline.line(len(workers)).needs)


def ring(workers: int, rounds: int) -> Pipeline:
    return line([*range(workers)] * rounds)


def v_shape(workers: int) -> Pipeline:
    return line([*range(workers), *reversed(range(workers))])


def longest_path(pipeline: Pipeline, stage: int) -> int:
    users = [user for user, needs in enumerate(pipeline.needs) if stage in needs]
    return 1 + max((longest_path(pipeline, user) for user in users), default=0)


def promised_tapes(name: str, pipeline: Pipeline, microbatches: int) -> list[int]:
    """What the docstring of each rule says that a worker holds at most."""
    n, p = len(pipeline.workers), len(set(pipeline.workers))
    to_end = [longest_path(pipeline, stage) for stage in range(n)]
    of_stage = {
        "gpipe": [microbatches] * n,
        "1f1b": [n - stage for stage in range(n)],
        "zb_h1": [max(to_end)] * n,
        "zb_h2": [2 * max(to_end) - 1] * n,
        "zb_v": to_end,
    }
    found = []
    for worker in range(p):
        mine = [stage for stage in range(n) if pipeline.workers[stage] == worker]
        if name not in (*WHOLE, *SPLIT):  # a new one: what its rule allows
            rule = _RULES[name](pipeline, microbatches)
            limits = rule.tapes or rule.in_flight or (microbatches,) * n
            found.append(sum(limits[stage] for stage in mine))
        elif name in of_stage:
            found.append(sum(of_stage[name][stage] for stage in mine))
        elif n == p:
            found.append(n - mine[0])
        else:
            limit = 2 * (p - worker - 1) + (len(mine) - 1) * p + 1
            on_a_ring = n % p == 0 and pipeline == ring(p, n // p)
            found.append(limit if on_a_ring else max(limit, len(mine) * p))
    return found


@given(pipelines(), st.integers(1, 9), st.sampled_from(NAMES), st.booleans(), st.data())
def test_any_graph_with_any_costs(pipeline, microbatches, name, uneven, data):
    costs = data.draw(uneven_costs(len(pipeline.workers))) if uneven else None
    found = schedule(name, pipeline, microbatches, costs)
    check(found)
    assert bool(found.split) == (_RULES[name](pipeline, microbatches).tapes is not None)
    for order in found.orders:  # the order in which plain torch adds gradients
        for kind, stage in itertools.product("FBW", range(len(pipeline.workers))):
            passing = [a.microbatch for a in order if (a.kind, a.stage) == (kind, stage)]
            assert passing == sorted(passing)
        if name == "gpipe":
            kinds = "".join(action.kind for action in order)
            assert kinds.lstrip("F").strip("B") == ""
    for peak, most in zip(
        found.peak_tapes(), promised_tapes(name, pipeline, microbatches), strict=True
    ):
        assert peak <= most


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12), st.sampled_from(NAMES))
def test_a_ring_holds_what_is_promised(workers, rounds, microbatches, name):
    pipeline = ring(workers, rounds)
    peaks = schedule(name, pipeline, microbatches).peak_tapes()
    most = promised_tapes(name, pipeline, microbatches)
    assert all(peak <= limit for peak, limit in zip(peaks, most, strict=True))


@pytest.mark.parametrize("name", [*WHOLE, *SPLIT])
def test_backwards_are_split_or_whole(name):
    assert bool(schedule(name, ring(2, 1), 3).split) == (name in SPLIT)


LINES = pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
FACTORS = pytest.mark.parametrize("factor", [1, 2, 4])


@LINES
@FACTORS
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name, p, factor):
    m = factor * p
    found = schedule(name, Pipeline.line(p), m)
    for costs in (Costs.uniform(p), Costs.uniform(p, 2.0, 1.0, 3.0)):
        assert found.bubble(costs) == pytest.approx((p - 1) / (m + p - 1))
        assert found.bubble(costs, flush=True) == pytest.approx((p - 1) / (m + p - 1))


@LINES
@FACTORS
@pytest.mark.parametrize("v", [2, 3])
def test_bubble_of_interleaved_1f1b(p, factor, v):
    m = factor * p
    found = schedule("interleaved_1f1b", ring(p, v), m)
    assert found.bubble(Costs.uniform(v * p)) == pytest.approx((p - 1) / (v * m + p - 1))


@LINES
@FACTORS
def test_bubble_of_zb_h1(p, factor):
    m = factor * p
    found = schedule("zb_h1", Pipeline.line(p), m)
    assert found.bubble(Costs.uniform(p)) == pytest.approx((p - 1) / (3 * m + p - 1))
    assert found.peak_tapes() == (p,) * p


@LINES
@FACTORS
def test_zb_h2_has_no_bubble(p, factor):
    m = factor * (2 * p - 1)
    found = schedule("zb_h2", Pipeline.line(p), m)
    assert found.bubble(Costs.uniform(p)) == 0
    assert found.peak_tapes() == (2 * p - 1,) * p
    # The workers start one after the other: a flush waits for the last one.
    assert found.bubble(Costs.uniform(p), flush=True) == pytest.approx((p - 1) / (3 * m + p - 1))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("extra", range(7))
def test_zb_v_has_no_bubble(p, extra):
    found = schedule("zb_v", v_shape(p), 2 * p - 1 + extra)
    assert found.bubble(Costs.uniform(2 * p)) == 0
    assert max(found.peak_tapes()) <= 2 * p + 1  # of half the size of those of 1F1B


def megatron(p: int, v: int, m: int, worker: int) -> list[Action]:
    """The published order: warm-up, one forward and one backward in turn, cool-down."""

    def at(k: int) -> tuple[int, int]:
        return k % (p * v) // p, k // (p * v) * p + k % p

    forwards = [Action("F", c * p + worker, j) for c, j in map(at, range(m * v))]
    backwards = [Action("B", (v - 1 - c) * p + worker, j) for c, j in map(at, range(m * v))]
    warmup = min(2 * (p - worker - 1) + (v - 1) * p, m * v)
    pairs = itertools.zip_longest(forwards[warmup:], backwards)
    return forwards[:warmup] + [action for pair in pairs for action in pair if action]


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("v", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_interleaved_1f1b_is_the_published_one(p, v, groups):
    found = schedule("interleaved_1f1b", ring(p, v), groups * p)
    assert list(map(list, found.orders)) == [megatron(p, v, groups * p, i) for i in range(p)]


def test_interleaved_1f1b_where_no_ring_is():
    # By the limits of a ring worker 1 would take one microbatch, and worker 0 wait for the second.
    found = schedule("interleaved_1f1b", line((1, 0, 0)), 4)
    check(found)
    assert found.peak_tapes()[1] == 2


def test_interleaved_1f1b_with_one_stage_a_worker_is_1f1b():
    found = schedule("interleaved_1f1b", Pipeline.line(3), 5)
    assert found.orders == schedule("1f1b", Pipeline.line(3), 5).orders


def test_1f1b_is_the_published_one():
    found = schedule("1f1b", Pipeline.line(4), 8)
    assert str(found).splitlines()[0] == (
        "0: F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 F0.6 B0.3 F0.7 B0.4 B0.5 B0.6 B0.7"
    )


def test_branches_count_by_the_longest_path():
    # Three branches beside each other, of one stage each, and where they join.
    fan = Pipeline((0, 1, 2, 3, 4), ((), (0,), (0,), (0,), (1, 2, 3)))
    assert fan.to_end == (3, 2, 2, 2, 1)
    assert schedule("zb_h1", fan, 9).peak_tapes() == (3,) * 5
    assert schedule("1f1b", fan, 9).peak_tapes()[0] > 3
    skip = Pipeline((0, 1, 2), ((), (0,), (0, 1)))
    assert skip.to_end == (3, 2, 1)


def test_costs_make_the_order():
    # The turn of this V is one stage of twice the length.
    pipeline, costs = line((0, 1, 0)), Costs((1, 2, 1), (1, 2, 1), (1, 2, 1))
    known, unknown = schedule("zb_v", pipeline, 6, costs), schedule("zb_v", pipeline, 6)
    assert known.bubble(costs) < unknown.bubble(costs) / 2


def test_a_worker_does_its_weights_while_a_value_is_on_its_way():
    found = schedule("zb_h1", Pipeline.line(2), 2, Costs.uniform(2, latency=1.0))
    assert str(found).splitlines()[0] == "0: F0.0 F0.1 B0.0 W0.0 B0.1 W0.1"


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match="need each other"):
        schedule("gpipe", Pipeline((0, 1), ((1,), (0,))), 1)
    with pytest.raises(ValueError, match="'zigzag'; there are 'gpipe', '1f1b', 'interleaved_1f1b'"):
        schedule("zigzag", Pipeline.line(2), 2)
    with pytest.raises(ValueError, match="at least one microbatch"):
        schedule("gpipe", Pipeline.line(2), 0)


def test_a_rule_of_ones_own():
    rule = Rule(oldest_first("BFW"), in_flight=(1, 1), tapes=(2, 2))
    orders = carry_out(rule, Pipeline.line(2), 3)
    found = Schedule("one at a time", Pipeline.line(2), 3, orders)
    check(found)
    assert str(found).splitlines()[0] == "0: F0.0 B0.0 F0.1 W0.0 B0.1 F0.2 W0.1 B0.2 W0.2"
    assert found.peak_tapes() == (2, 1)


def test_drawing_of_several_stages_a_worker():
    assert drawing("1f1b", line((0, 1, 0)), 1).splitlines() == [
        "0: F0.0 ..   F2.0 B2.0 --   ..   ..   B0.0 --",
        "1: ..   F1.0 ..   ..   ..   B1.0 --   ..   ..",
    ]


@given(pipelines(), st.integers(1, 6), st.integers(1, 20), st.booleans(), st.data())
def test_the_fastest_that_fits(pipeline, microbatches, limit, flush, data):
    costs = data.draw(uneven_costs(len(pipeline.workers)))
    candidates = [schedule(name, pipeline, microbatches) for name in NAMES]
    limits = [limit] * len(pipeline.stages_of)
    fitting = [found for found in candidates if max(found.peak_tapes()) <= limit]
    if not fitting:
        with pytest.raises(ValueError, match=r"workers can hold .* schedules need gpipe"):
            fastest(candidates, costs, limits, flush)
        return
    found = fastest(candidates, costs, limits, flush)
    assert found in fitting

    def length(of: Schedule) -> float:
        timeline = of.timeline(costs)
        return timeline.duration if flush else timeline.period

    assert length(found) == min(map(length, fitting))


def test_a_flush_may_make_another_one_the_fastest():
    costs = Costs.uniform(3)
    candidates = [schedule(name, Pipeline.line(3), 5) for name in ("zb_h2", "zb_h1")]
    assert fastest(candidates, costs, [9] * 3).name == "zb_h2"
    assert fastest(candidates, costs, [9] * 3, flush=True).name == "zb_h1"  # with fewer tapes
