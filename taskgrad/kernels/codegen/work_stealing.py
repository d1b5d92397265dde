"""How the threads of a call share its items.

All of them get the address of one row of whole numbers, which says what to do, and count there what
they took. Each begins with a range of the items that is its own, as torch's operations divide them:
what the operation before wrote, or read, is in the caches of the core that did it. Whoever is done
helps the next, so that one that is held up does not hold up all.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# What the row has; then the operands' addresses, then for each thread what is taken of its range.
CALL = (
    *("ticket", "threads", "who", "ranges", "step", "items"),
    *("meta", "scratch", "scratch_size", "from_end", "failed", "done"),
)
_WHERE = {name: i for i, name in enumerate(CALL)}
# What each thread reads; the others are counted in, where they lie.
_READ = [name for name in CALL if name not in ("ticket", "failed", "done")]
TICKET, THREADS, RANGES = (_WHERE[name] for name in ("ticket", "threads", "ranges"))
FROM_END, FAILED, DONE = (_WHERE[name] for name in ("from_end", "failed", "done"))
# What is under FAILED where no function raised: an integer was divided by 0.
ZERO_DIVISION = 2
_PIECES = 32  # of a range


def entry(addresses: Sequence[str]) -> list[str]:
    """The first lines of a kernel: what each thread reads of the call whose address it gets."""
    lines = ["def kernel(call):"]
    lines += [f"    {name} = m.load_int64(call, {_WHERE[name]})" for name in _READ]
    addressed = enumerate(addresses, start=len(CALL))
    lines += [f"    {name} = m.load_int64(call, {i})" for i, name in addressed]
    return [
        *lines,
        f"    ticket = m.take(call, {TICKET}, 1)",
        "    scratch += ticket * scratch_size",
        # A team of OpenMP numbers its threads; others are numbered as they come.
        "    home = (m.answer(who) if who != 0 else ticket) % threads",
        "    item, last, helped = -1, 0, 0",
    ]


# A thread goes over the items it took, and takes the next ones until there are none; the last ones
# first, if so called, but always forwards among those it took, as processors read ahead.
ITEMS = (
    "    while True:",
    "        item += 1",
    "        if item >= last:",
    "            while helped < threads:",
    "                low, high = items * home // threads, items * (home + 1) // threads",
    "                item = low + m.take(call, ranges + home, step)",
    "                if item < high:",
    "                    break",
    "                home, helped = (home + 1) % threads, helped + 1",
    "            if helped == threads:",
    "                break",
    "            last = min(high, item + step)",
    "            if from_end:",
    "                item, last = low + high - last, low + high - item",
)


def row_of(
    items: int,
    addresses: Sequence[int],
    *,
    meta: int,
    place: int,
    scratch: int,
    threads: int,
    who: int,
    turns: bool,
) -> array[int]:
    """The row of a call.

    Parameters
    ----------
    items : int
    addresses : sequence of int
        Of its operands.
    meta : int
        The address of the numbers that its layout passes.
    place : int
        Where the memory begins that `scratch` bytes of are each thread's; what they need together
        lies behind it, and its address is one more operand, the last.
    scratch, threads : int
    who : int
        The address of a C function that tells a thread its number in the team, or 0.
    turns : bool
        Whether it may begin with the last items, so that even one thread takes pieces of them.
    """
    step = -(-items // (threads * _PIECES)) if threads > 1 or turns else items
    ranges = len(CALL) + len(addresses) + 1
    numbers = (0, threads, who, ranges, step, items, meta, place, scratch, 0, 0, 0)
    return array("q", (*numbers, *addresses, place + scratch * threads, *[0] * threads))


def begin_again(row: array[int]) -> None:
    """As if nothing had been done yet."""
    row[TICKET] = row[DONE] = 0
    row[row[RANGES] :] = array("q", bytes(8 * row[THREADS]))
