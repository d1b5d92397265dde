"""Repeated reductions: alternating directions, and calls that are kept prepared."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels.codegen import reduce_source
from taskgrad.kernels.codegen.work_stealing import BACKWARDS
from taskgrad.kernels.runtime import reduce, reduce_pass, thread_team


@pytest.fixture
def directions(monkeypatch):
    """For each call of a kernel from now on, whether it reads backwards."""
    found: list[bool] = []
    stock = thread_team.prepare

    def prepare(kernel, address, count):
        start = stock(kernel, address, count)
        number = ctypes.c_int64.from_address(address + 8 * BACKWARDS)

        def go():
            found.append(bool(number.value))
            start()

        return go

    monkeypatch.setattr(thread_team, "prepare", prepare)
    monkeypatch.setattr(reduce_pass, "_CACHED_FOR", 60)
    monkeypatch.setattr(
        reduce_pass, "_read_backwards", 0
    )  # another test's memory may have been here
    return found


def make_add():
    return tg.vectorize(lambda a, b: a + b)


@pytest.mark.parametrize("shape", [(300_000,), (3, 100_000)])
def test_directions_alternate(directions, shape):
    """Reductions to one element are prepared from the second on; those of rows are not."""
    add, dim = make_add(), len(shape) - 1
    x, y = torch.randn(shape), torch.randn(shape)
    results = [add.reduce(x, dim) for _ in range(4)]
    assert directions == [True, False, True, False]
    assert all(torch.equal(r, results[0]) for r in results)
    add.reduce(x, dim)
    add.reduce(y, dim)
    add.reduce(x, dim)  # after another tensor
    assert directions[4:] == [True, True, True]


@pytest.mark.parametrize("shape", [(300_000,), (3, 100_000)])
def test_after_a_while_the_direction_is_forgotten(directions, monkeypatch, shape):
    monkeypatch.setattr(reduce_pass, "_CACHED_FOR", 0)
    add, x = make_add(), torch.randn(shape)
    for _ in range(3):
        add.reduce(x, len(shape) - 1)
    assert directions == [True, True, True]


def test_prefetching_beyond_the_caches_gives_the_same_bits(monkeypatch):
    def planned(add):
        (plan,) = add._reduction.reducer._plans.values()
        return plan.first.meta[-1].item()

    within, beyond, x = make_add(), make_add(), torch.randn(300_000)
    expected = within.reduce(x)
    monkeypatch.setattr(reduce, "last_level_cache", lambda: x.nbytes - 1)
    assert torch.equal(beyond.reduce(x), expected)
    assert (planned(within), planned(beyond)) == (0, reduce_source.PREFETCH_DISTANCE)


def test_functions_that_do_not_commute_read_forwards(directions):
    latter = tg.vectorize(lambda a, b: b)
    x = torch.randn(300_000)
    for _ in range(2):
        assert latter.reduce(x) == x[-1]
    assert directions
    assert not any(directions)


def test_results_allocated_together_are_separate_tensors():
    add = make_add()
    xs = torch.randn(40, 1_000)
    found = [add.reduce(x) for x in xs]
    expected = torch.stack([*found])
    found[3].add_(1).requires_grad_().square().backward()
    assert torch.equal(torch.stack(found[4:]), expected[4:])
    assert torch.equal(torch.stack(found[:3]), expected[:3])
    torch.testing.assert_close(expected, xs.sum(1))
    assert len({t.untyped_storage().data_ptr() for t in found}) == 40


def test_a_missing_dimension_is_an_error_the_second_time_too():
    add, x = make_add(), torch.randn(1_000)
    for _ in range(3):
        assert torch.equal(add.reduce(x, -1), add.reduce(x, 0))
        for dim in (1, -2):
            with pytest.raises(IndexError, match="out of range"):
                add.reduce(x, dim)


def test_several_threads_at_once():
    add = make_add()
    xs = [torch.randn(200_000) for _ in range(8)]
    alone = [add.reduce(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = list(pool.map(add.reduce, xs))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_only_a_few_are_kept_prepared():
    add = make_add()
    for count in range(1_000, 1_040):
        for _ in range(2):
            assert add.reduce(torch.ones(count)) == count
    kept = [step for steps in add._reduction.reducer._steps.values() for step in steps]
    assert len(kept) == 40
    assert sum(isinstance(step, reduce_pass.FullReduce) for step in kept) == reduce._FULL_REDUCES


def test_reducing_in_other_ways_does_not_use_them_up():
    add, x = make_add(), torch.ones(1_000)
    for _ in range(2 * reduce._FULL_REDUCES):
        assert add.reduce(x, keepdim=True).tolist() == [1_000]
        assert add.reduce(x, start=1) == 1_001
    ((step,),) = add._reduction.reducer._steps.values()
    assert isinstance(step, reduce_pass.FullReduce)
