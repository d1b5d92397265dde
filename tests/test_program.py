"""Programs: where values are sent and received, and that no worker waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgrad.plan.program import (
    Instruction,
    Operation,
    Position,
    Program,
    Value,
    check,
    programs,
    unfinished,
)
from taskgrad.plan.rules import NAMES, schedule
from taskgrad.plan.schedule import Pipeline


def operations(pipeline: Pipeline, name: str, microbatches: int) -> list[list[Operation]]:
    """Forwards and backwards of a schedule, each with the values that it takes."""
    users = pipeline.users
    orders = []
    for order in schedule(name, pipeline, microbatches).orders:
        found = []
        for kind, stage, m in order:
            if kind == "F":
                takes = [Value(f"F{s}.{m}") for s in pipeline.needs[stage]]
            elif kind == "W":
                takes = [Value(f"B{stage}.{m}")]
            else:
                takes = [Value(f"F{stage}.{m}")]
                takes += [Value(f"B{s}.{m}", pipeline.needs[s].index(stage)) for s in users[stage]]
            found.append(Operation(f"{kind}{stage}.{m}", pipeline.workers[stage], tuple(takes)))
        orders.append(found)
    return orders


@st.composite
def pipelines(draw) -> Pipeline:
    """Stages with skips over workers, branches, and several stages a worker."""
    stages = draw(st.integers(1, 7))
    workers = [draw(st.integers(0, 3)) for _ in range(stages)]
    renamed = {w: i for i, w in enumerate(dict.fromkeys(workers))}
    needs = [()]
    for stage in range(1, stages):
        others = draw(st.sets(st.integers(0, stage - 1), max_size=2))
        needs.append(tuple(sorted({stage - 1, *others})))
    return Pipeline(tuple(renamed[w] for w in workers), tuple(needs))


@given(pipelines(), st.sampled_from(NAMES), st.integers(1, 6))
def test_every_value_is_there_when_it_is_taken(pipeline, name, microbatches):
    orders = operations(pipeline, name, microbatches)
    found = programs(orders)
    held: list[set[Value]] = [set() for _ in found]
    sent: set[tuple[Value, int, int]] = set()
    takes = {o.name: o.takes for order in orders for o in order}
    for program, order in zip(found, orders, strict=True):
        ran = [i.value.operation for i in program.instructions if i.kind == "run"]
        assert ran == [o.name for o in order]
    at = [0] * len(found)
    moved = True
    while moved:
        moved = False
        for worker, program in enumerate(found):
            while at[worker] < len(program.instructions):
                kind, value, peer = program.instructions[at[worker]]
                if kind == "receive":
                    if (value, peer, worker) not in sent:
                        break
                    sent.remove((value, peer, worker))
                    held[worker].add(value)
                elif kind == "send":
                    assert Value(value.operation) in held[worker]
                    sent.add((value, worker, peer))
                else:
                    for taken in takes[value.operation]:
                        assert {taken, Value(taken.operation)} & held[worker], (value, taken)
                    held[worker].add(value)
                at[worker] += 1
                moved = True
    assert at == [len(p.instructions) for p in found]
    assert not sent


@given(pipelines(), st.sampled_from(NAMES), st.integers(1, 6))
def test_a_value_travels_once_to_each_worker_that_takes_it(pipeline, name, microbatches):
    found = programs(operations(pipeline, name, microbatches))
    sends = [(i.value, p.worker, i.peer) for p in found for i in p.instructions if i.kind == "send"]
    receives = [
        (i.value, i.peer, p.worker) for p in found for i in p.instructions if i.kind == "receive"
    ]
    assert sorted(sends, key=str) == sorted(receives, key=str)
    assert len(set(sends)) == len(sends)
    assert all(source != target for _, source, target in sends)


@given(pipelines(), st.sampled_from(NAMES), st.integers(1, 6))
def test_as_many_buffers_as_were_held_are_enough(pipeline, name, microbatches):
    found = programs(operations(pipeline, name, microbatches))
    most = max(check(found), default=0)
    check(found, buffers=max(1, most))


F0, F1 = Operation("F0", 0), Operation("F1", 1, (Value("F0"),))


def test_an_operation_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="F0 occurs twice"):
        programs([[F0, F0], [F1]])


def test_an_operation_of_another_worker_is_refused():
    with pytest.raises(ValueError, match="F1 of worker 1 is in the order of worker 0"):
        programs([[F0, F1]])


def test_a_value_that_nothing_makes_is_refused():
    with pytest.raises(ValueError, match="F1 takes F0, which nothing makes"):
        programs([[], [F1]])


def test_workers_that_wait_for_each_other_are_found():
    a = Operation("A", 0, (Value("D"),)), Operation("B", 0)
    b = Operation("C", 1, (Value("B"),)), Operation("D", 1)
    with pytest.raises(ValueError, match="wait for ever: worker 0 at <1:D; worker 1 at <0:B"):
        programs([a, b])
    assert check(programs([a[::-1], b[::-1]])) == (1, 1)


def test_full_buffers_can_make_workers_wait_for_each_other():
    # Each sends two values before it receives any.
    found = [
        Program(
            worker,
            tuple(
                Instruction(kind, Value(f"{name}{source}"), 1 - worker)
                for kind, source in (("send", worker), ("receive", 1 - worker))
                for name in "ab"
            ),
        )
        for worker in (0, 1)
    ]
    assert check(found, buffers=2) == (2, 2)
    with pytest.raises(ValueError, match="worker 0 at >1:b0; worker 1 at >0:b1"):
        check(found, buffers=1)


def test_a_value_that_is_never_received_is_found():
    sends = Program(0, (Instruction("send", Value("F0"), 1),))
    with pytest.raises(ValueError, match="worker 1 never receives F0"):
        check([sends, Program(1, ())])


@given(st.data(), pipelines(), st.sampled_from(NAMES), st.integers(1, 4))
def test_where_a_lost_worker_was_is_known_from_the_others(data, pipeline, name, microbatches):
    """Programs run in any order that they allow; one is lost at some instruction."""
    found = programs(operations(pipeline, name, microbatches))
    at = [0] * len(found)
    arrived: list[set[Value]] = [set() for _ in found]
    for _ in range(data.draw(st.integers(0, sum(len(p.instructions) for p in found)))):
        ready = []
        for program in found:
            if at[program.worker] < len(program.instructions):
                kind, value, _ = program.instructions[at[program.worker]]
                if kind != "receive" or value in arrived[program.worker]:
                    ready.append(program.worker)
        if not ready:
            break
        worker = data.draw(st.sampled_from(ready))
        kind, value, peer = found[worker].instructions[at[worker]]
        if kind == "send":
            arrived[peer].add(value)
        elif kind == "receive":
            arrived[worker].remove(value)
        at[worker] += 1
    lost = data.draw(st.sampled_from(range(len(found))))
    others = {
        i: Position(7, at[i], frozenset((7, v) for v in arrived[i]))
        for i in range(len(found))
        if i != lost
    }
    named = unfinished(found, lost, 7, others)
    left = [i.value.operation for i in found[lost].instructions[at[lost] :] if i.kind == "run"]
    ran = [i.value.operation for i in found[lost].instructions[: at[lost]] if i.kind == "run"]
    if left and found[lost].instructions[at[lost]].kind == "run":
        assert left[0] in named  # what it was at
    assert named == [*ran, *left][len(ran) - len(set(named) & set(ran)) :][: len(named)]
    if len(found) == 1:
        assert named == [*ran, *left]
