"""How the threads of a call divide its items: a queue for each thread, and work stealing.

All threads get the address of the same call descriptor, an array of int64 with the parameters, the
operands' addresses and the shared counters. A thread first takes chunks of its own queue, which is
the range that torch's operations would assign to it, so its core's cache may hold that memory
already. When its queue is empty it steals from the next one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# Then follow the operands' addresses and, for each thread, how many items of its queue are taken.
CALL = (
    *("next_thread", "threads", "thread_id", "queues", "chunk", "items"),
    *("meta", "scratch", "scratch_size", "backwards", "failed", "done"),
)
_FIELD = {name: i for i, name in enumerate(CALL)}
# Counters stay in memory; each thread reads the other fields once.
_READ_ONCE = [name for name in CALL if name not in ("next_thread", "failed", "done")]
NEXT_THREAD, THREADS, QUEUES = (_FIELD[name] for name in ("next_thread", "threads", "queues"))
BACKWARDS, FAILED, DONE = (_FIELD[name] for name in ("backwards", "failed", "done"))
# The value of "failed" if an integer was divided by 0; 1 if a function raised.
ZERO_DIVISION = 2
_CHUNKS = 32  # of a queue


def prologue(operands: Sequence[str]) -> list[str]:
    """The first lines of a kernel: the descriptor's fields and the operands' addresses."""
    lines = ["def kernel(call):"]
    lines += [f"    {name} = m.load_int64(call, {_FIELD[name]})" for name in _READ_ONCE]
    addressed = enumerate(operands, start=len(CALL))
    lines += [f"    {name} = m.load_int64(call, {i})" for i, name in addressed]
    return [
        *lines,
        f"    thread = m.fetch_add(call, {NEXT_THREAD}, 1)",
        "    scratch += thread * scratch_size",
        # OpenMP numbers the threads of a team; others are numbered in the order of their arrival.
        "    queue = (m.call_int(thread_id) if thread_id != 0 else thread) % threads",
        "    item, last, empty = -1, 0, 0",
    ]


# The loop over items. `backwards` takes the last chunk of a queue first, but goes forwards within
# a chunk, as hardware prefetchers do.
ITEM_LOOP = (
    "    while True:",
    "        item += 1",
    "        if item >= last:",
    "            while empty < threads:",
    "                low, high = items * queue // threads, items * (queue + 1) // threads",
    "                item = low + m.fetch_add(call, queues + queue, chunk)",
    "                if item < high:",
    "                    break",
    "                queue, empty = (queue + 1) % threads, empty + 1",
    "            if empty == threads:",
    "                break",
    "            last = min(high, item + chunk)",
    "            if backwards:",
    "                item, last = low + high - last, low + high - item",
)


def call_descriptor(
    items: int,
    addresses: Sequence[int],
    *,
    meta: int,
    scratch: int,
    scratch_size: int,
    threads: int,
    thread_id: int,
    chunked: bool,
) -> array[int]:
    """The descriptor of a call on operands at these addresses.

    At `meta` are the loop nest's parameters, at `scratch` the threads' scratch memory,
    `scratch_size` bytes each; memory that they share follows, and its address is passed as the last
    operand. At `thread_id` is a C function that returns a thread's number in its team, unless 0.
    `chunked` divides the queue into chunks even for one thread; `backwards` needs that.
    """
    chunk = -(-items // (threads * _CHUNKS)) if threads > 1 or chunked else items
    queues = len(CALL) + len(addresses) + 1
    fields = (0, threads, thread_id, queues, chunk, items, meta, scratch, scratch_size, 0, 0, 0)
    shared = scratch + scratch_size * threads
    return array("q", (*fields, *addresses, shared, *[0] * threads))


def reset(call: array[int]) -> None:
    """Set the counters back to the state before the call."""
    call[NEXT_THREAD] = call[DONE] = 0
    call[call[QUEUES] :] = array("q", bytes(8 * call[THREADS]))
