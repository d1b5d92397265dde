"""Rows that are reduced again are read from the end that was read last."""

from __future__ import annotations

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels import threads
from taskgrad.kernels.compiled import compiled
from taskgrad.kernels.source import HEAD, ITEMS, entry

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
    stock = threads.run

    def run(*args, from_end=False, **kwargs):
        found.append(from_end)
        return stock(*args, from_end=from_end, **kwargs)

    monkeypatch.setattr(threads, "run", run)
    return found


def test_one_thread_goes_forwards_or_takes_the_last_pieces_first():
    assert order(100, 1, False) == list(range(100))
    taken = order(100, 1, True)  # in pieces of four: 32 for a thread
    assert taken == [i for first in range(96, -1, -4) for i in range(first, first + 4)]


@pytest.mark.parametrize("items", [1, 2, 31, 32, 33, 64, 65, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_every_item_once(items, most):
    assert sorted(order(items, most, True)) == list(range(items))


def test_memory_is_gone_through_to_and_fro(directions):
    add = tg.vectorize(lambda a, b: a + b)
    x, y = torch.randn(300_000), torch.randn(300_000)
    results = [add.reduce(x) for _ in range(3)]
    assert directions == [True, False, True]
    assert all(torch.equal(r, results[0]) for r in results)
    add.reduce(y)
    add.reduce(x)  # somebody else was there in between
    assert directions[3:] == [True, True]


def test_what_may_not_be_read_as_a_table_is_read_forwards(directions):
    latter = tg.vectorize(lambda a, b: b)
    x = torch.randn(300_000)
    assert latter.reduce(x) == x[-1]
    assert set(directions) == {False}
