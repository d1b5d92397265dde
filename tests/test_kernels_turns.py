"""Reductions that are done again: read from the end that was read last, and kept ready."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels import folding, repeated, threads
from taskgrad.kernels.compiled import compiled
from taskgrad.kernels.source import CALL, HEAD, ITEMS, entry

# Writes down in which order a thread goes over the items.
ORDER = "\n".join(
    [
        HEAD.format(title="order"),
        *entry(("count", "order")),
        *ITEMS,
        "        m.store_int64(order, m.take(count, 0, 1), item)",
    ]
)


def order(items: int, most: int, from_end: bool) -> list[int]:
    found, count = torch.full((items,), -1), torch.zeros(1, dtype=torch.int64)
    addresses = [count.data_ptr(), found.data_ptr()]
    kernel = compiled(ORDER, "order")
    threads.run(kernel, items, addresses, meta=0, threads=most, from_end=from_end)
    return found.tolist()


@pytest.fixture
def directions(monkeypatch):
    """For each call of a kernel from now on, whether it begins at the end."""
    found: list[bool] = []
    stock = threads.start_of

    def start_of(kernel, address, count):
        start = stock(kernel, address, count)
        number = ctypes.c_int64.from_address(address + 8 * CALL.index("from_end"))

        def go():
            found.append(bool(number.value))
            start()

        return go

    monkeypatch.setattr(threads, "start_of", start_of)
    monkeypatch.setattr(repeated, "_HOLDS", 60)
    monkeypatch.setattr(repeated, "_ended", 0)  # another test's memory may have been here
    return found


def test_one_thread_goes_forwards_or_takes_the_last_pieces_first():
    assert order(100, 1, False) == list(range(100))
    taken = order(100, 1, True)  # in pieces of four: 32 for a thread
    assert taken == [i for first in range(96, -1, -4) for i in range(first, first + 4)]


@pytest.mark.parametrize("items", [1, 2, 31, 32, 33, 64, 65, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_every_item_once(items, most):
    assert sorted(order(items, most, True)) == list(range(items))


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
    monkeypatch.setattr(repeated, "_HOLDS", 0)
    add, x = make_add(), torch.randn(shape)
    for _ in range(3):
        add.reduce(x, len(shape) - 1)
    assert directions == [True, True, True]


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
    assert sum(isinstance(step, repeated.Repeated) for step in kept) == folding._READY


def test_reducing_in_other_ways_does_not_use_them_up():
    add, x = make_add(), torch.ones(1_000)
    for _ in range(2 * folding._READY):
        assert add.reduce(x, keepdim=True).tolist() == [1_000]
        assert add.reduce(x, start=1) == 1_001
    ((step,),) = add._folds.folder._steps.values()
    assert isinstance(step, repeated.Repeated)
