"""Reductions that are done again: read from the end that was read last, and kept ready."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels.codegen import reduce_source
from taskgrad.kernels.codegen.work_stealing import FROM_END
from taskgrad.kernels.runtime import full_reduce, reduce, thread_team


@pytest.fixture
def directions(monkeypatch):
    """For each call of a kernel from now on, whether it begins at the end."""
    found: list[bool] = []
    stock = thread_team.start_of

    def start_of(kernel, address, count):
        start = stock(kernel, address, count)
        number = ctypes.c_int64.from_address(address + 8 * FROM_END)

        def go():
            found.append(bool(number.value))
            start()

        return go

    monkeypatch.setattr(thread_team, "start_of", start_of)
    monkeypatch.setattr(full_reduce, "_HOLDS", 60)
    monkeypatch.setattr(full_reduce, "_ended", 0)  # another test's memory may have been here
    return found


def make_add():
    return tg.vectorize(lambda a, b: a + b)


@pytest.mark.parametrize("shape", [(300_000,), (3, 100_000)])
def test_memory_is_gone_through_to_and_fro(directions, shape):
    """Reductions to one element are kept ready from the second on; those of rows are not."""
    add, dim = make_add(), len(shape) - 1
    x, y = torch.randn(shape), torch.randn(shape)
    results = [add.reduce(x, dim) for _ in range(4)]
    assert directions == [True, False, True, False]
    assert all(torch.equal(r, results[0]) for r in results)
    add.reduce(x, dim)
    add.reduce(y, dim)
    add.reduce(x, dim)  # somebody else was there in between
    assert directions[4:] == [True, True, True]


@pytest.mark.parametrize("shape", [(300_000,), (3, 100_000)])
def test_after_a_while_others_were_there(directions, monkeypatch, shape):
    monkeypatch.setattr(full_reduce, "_HOLDS", 0)
    add, x = make_add(), torch.randn(shape)
    for _ in range(3):
        add.reduce(x, len(shape) - 1)
    assert directions == [True, True, True]


def test_what_does_not_fit_in_the_caches_is_read_ahead_to_the_same_bits(monkeypatch):
    def planned(add):
        (plan,) = add._folds.folder._plans.values()
        return plan.first.meta[-1].item()

    within, beyond, x = make_add(), make_add(), torch.randn(300_000)
    expected = within.reduce(x)
    monkeypatch.setattr(reduce, "last_cache", lambda: x.nbytes - 1)
    assert torch.equal(beyond.reduce(x), expected)
    assert (planned(within), planned(beyond)) == (0, reduce_source.AHEAD)


def test_what_may_not_be_read_as_a_table_is_read_forwards(directions):
    latter = tg.vectorize(lambda a, b: b)
    x = torch.randn(300_000)
    for _ in range(2):
        assert latter.reduce(x) == x[-1]
    assert directions
    assert not any(directions)


def test_results_that_are_made_together_are_tensors_of_their_own():
    add = make_add()
    xs = torch.randn(40, 1_000)
    found = [add.reduce(x) for x in xs]
    expected = torch.stack([*found])
    found[3].add_(1).requires_grad_().square().backward()
    assert torch.equal(torch.stack(found[4:]), expected[4:])
    assert torch.equal(torch.stack(found[:3]), expected[:3])
    torch.testing.assert_close(expected, xs.sum(1))
    assert len({t.untyped_storage().data_ptr() for t in found}) == 40


def test_a_dimension_that_is_not_there_is_an_error_the_second_time_too():
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


def test_no_more_than_a_few_are_kept_ready():
    add = make_add()
    for count in range(1_000, 1_040):
        for _ in range(2):
            assert add.reduce(torch.ones(count)) == count
    kept = [step for steps in add._folds.folder._steps.values() for step in steps]
    assert len(kept) == 40
    assert sum(isinstance(step, full_reduce.Repeated) for step in kept) == reduce._READY


def test_reducing_in_other_ways_does_not_use_them_up():
    add, x = make_add(), torch.ones(1_000)
    for _ in range(2 * reduce._READY):
        assert add.reduce(x, keepdim=True).tolist() == [1_000]
        assert add.reduce(x, start=1) == 1_001
    ((step,),) = add._folds.folder._steps.values()
    assert isinstance(step, full_reduce.Repeated)
