"""Which thread of a call computes which of its items."""

from __future__ import annotations

import ctypes
from itertools import chain

import pytest
import torch

from taskgrad.kernels.codegen.elementwise_source import HEAD
from taskgrad.kernels.codegen.work_stealing import (
    BACKWARDS,
    DONE,
    ITEM_LOOP,
    NEXT_THREAD,
    call_descriptor,
    prologue,
    reset,
)
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import compile_kernel

# Records the order in which a thread takes the items.
ORDER = "\n".join(
    [
        HEAD.format(title="order"),
        *prologue(("count", "order")),
        *ITEM_LOOP,
        "        m.store_int64(order, m.fetch_add(count, 0, 1), item)",
    ]
)
# A thread records its number for its first item, and waits until all of them have one.
NUMBERS = "\n".join(
    [
        HEAD.format(title="numbers"),
        *prologue(("here", "found")),
        *ITEM_LOOP,
        "        m.store_int64(found, item, m.call_int(thread_id))",
        "        m.fetch_add(here, 0, 1)",
        "        spins = 1_000_000_000",
        "        while m.fetch_add(here, 0, 0) < threads and spins > 0:",
        "            spins -= 1",
    ]
)


def order(items: int, most: int, backwards: bool) -> list[int]:
    found, count = torch.full((items,), -1), torch.zeros(1, dtype=torch.int64)
    addresses = [count.data_ptr(), found.data_ptr()]
    kernel = compile_kernel(ORDER, "order")
    thread_team.run(kernel, items, addresses, meta=0, threads=most, backwards=backwards)
    return found.tolist()


def test_one_thread_goes_forwards_or_takes_the_last_chunks_first():
    assert order(100, 1, False) == list(range(100))
    taken = order(100, 1, True)  # in chunks of four: 32 for a thread
    assert taken == [i for first in range(96, -1, -4) for i in range(first, first + 4)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("items", [1, 2, 31, 32, 33, 64, 65, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_every_item_once(items, most, backwards):
    assert sorted(order(items, most, backwards)) == list(range(items))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_thread_begins_with_its_own_queue_and_then_steals(backwards):
    """One of three, the others of which never come; then all of it by another one."""
    kernel = compile_kernel(ORDER, "order")
    found, count = torch.full((9,), -1), torch.zeros(1, dtype=torch.int64)
    call = call_descriptor(
        9,
        [count.data_ptr(), found.data_ptr()],
        meta=0,
        scratch=0,
        scratch_size=0,
        threads=3,
        thread_id=0,
        chunked=backwards,
    )
    call[BACKWARDS] = backwards
    step = -1 if backwards else 1
    for first in (1, 2, 0):
        reset(call)
        call[NEXT_THREAD] = first
        count.zero_()
        kernel.run(call.buffer_info()[0])
        queues = [[0, 1, 2][::step], [3, 4, 5][::step], [6, 7, 8][::step]]
        assert found.tolist() == [*chain(*queues[first:], *queues[:first])]
        assert call[DONE] == 0


def test_threads_of_a_team_have_the_ranges_that_torch_gives_them():
    if thread_team.thread_id_function() == 0:
        pytest.skip("torch's threads are not OpenMP's here")
    here, found = torch.zeros(1, dtype=torch.int64), torch.full((3,), -1)
    addresses = [here.data_ptr(), found.data_ptr()]
    thread_team.run(compile_kernel(NUMBERS, "numbers"), 3, addresses, meta=0, threads=3)
    assert found.tolist() == [0, 1, 2]
    mine = ctypes.CFUNCTYPE(ctypes.c_int)(thread_team.thread_id_function())
    assert mine() == 0
