"""Which thread of a call computes which of its items."""

from __future__ import annotations

import ctypes
from itertools import chain

import pytest
import torch

from taskgrad.kernels.codegen.elementwise_source import HEAD
from taskgrad.kernels.codegen.work_stealing import (
    DONE,
    FROM_END,
    ITEMS,
    TICKET,
    begin_again,
    entry,
    row_of,
)
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import compiled

# Writes down in which order a thread goes over the items.
ORDER = "\n".join(
    [
        HEAD.format(title="order"),
        *entry(("count", "order")),
        *ITEMS,
        "        m.store_int64(order, m.take(count, 0, 1), item)",
    ]
)
# A thread writes down its number for its first item, and waits until all of them have one.
NUMBERS = "\n".join(
    [
        HEAD.format(title="numbers"),
        *entry(("here", "found")),
        *ITEMS,
        "        m.store_int64(found, item, m.answer(who))",
        "        m.take(here, 0, 1)",
        "        patience = 1_000_000_000",
        "        while m.take(here, 0, 0) < threads and patience > 0:",
        "            patience -= 1",
    ]
)


def order(items: int, most: int, from_end: bool) -> list[int]:
    found, count = torch.full((items,), -1), torch.zeros(1, dtype=torch.int64)
    addresses = [count.data_ptr(), found.data_ptr()]
    kernel = compiled(ORDER, "order")
    thread_team.run(kernel, items, addresses, meta=0, threads=most, from_end=from_end)
    return found.tolist()


def test_one_thread_goes_forwards_or_takes_the_last_pieces_first():
    assert order(100, 1, False) == list(range(100))
    taken = order(100, 1, True)  # in pieces of four: 32 for a thread
    assert taken == [i for first in range(96, -1, -4) for i in range(first, first + 4)]


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("items", [1, 2, 31, 32, 33, 64, 65, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_every_item_once(items, most, from_end):
    assert sorted(order(items, most, from_end)) == list(range(items))


@pytest.mark.parametrize("from_end", [False, True])
def test_a_thread_begins_with_its_own_range_and_then_helps_the_next(from_end):
    """One of three, the others of which never come; then all of it by another one."""
    kernel = compiled(ORDER, "order")
    found, count = torch.full((9,), -1), torch.zeros(1, dtype=torch.int64)
    row = row_of(
        9,
        [count.data_ptr(), found.data_ptr()],
        meta=0,
        place=0,
        scratch=0,
        threads=3,
        who=0,
        turns=from_end,
    )
    row[FROM_END] = from_end
    step = -1 if from_end else 1
    for first in (1, 2, 0):
        begin_again(row)
        row[TICKET] = first
        count.zero_()
        kernel.run(row.buffer_info()[0])
        ranges = [[0, 1, 2][::step], [3, 4, 5][::step], [6, 7, 8][::step]]
        assert found.tolist() == [*chain(*ranges[first:], *ranges[:first])]
        assert row[DONE] == 0


def test_threads_of_a_team_have_the_ranges_that_torch_gives_them():
    if thread_team.who() == 0:
        pytest.skip("torch's threads are not OpenMP's here")
    here, found = torch.zeros(1, dtype=torch.int64), torch.full((3,), -1)
    addresses = [here.data_ptr(), found.data_ptr()]
    thread_team.run(compiled(NUMBERS, "numbers"), 3, addresses, meta=0, threads=3)
    assert found.tolist() == [0, 1, 2]
    mine = ctypes.CFUNCTYPE(ctypes.c_int)(thread_team.who())
    assert mine() == 0
