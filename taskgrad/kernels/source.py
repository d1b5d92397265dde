"""The source of a kernel: one loop over tensors of any strides.

A kernel goes over **items**: blocks of a few thousand elements, so that any number of threads can
share them. The innermost dimension is the columns, the next one the rows. How an operand's memory
lies along the columns is part of the source, by a letter, so that LLVM knows it:

====== =======================================================================================
letter meaning
====== =======================================================================================
u      unit stride: neighbours in memory
z      zero stride: one element for the whole row, read once
s      some other stride
t      unit stride along the rows: a block is first turned round in scratch memory
p      an output of unit stride that goes past the caches (`taskgrad.kernels.streamed`)
====== =======================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.kernels import streamed, summed
from taskgrad.kernels.body import Body, cast
from taskgrad.kernels.dtypes import SIZES, Kind
from taskgrad.kernels.formula import Formula

# The numbers that a layout passes to a kernel, in this order, before sizes and strides.
HEADER = ("depth", "rows", "cols", "row_block", "col_block", "row_blocks", "col_blocks")
# Elements of scratch memory: for a block that is turned round, with rows that do not fall on the
# same cache lines.
TILE = 128
TILE_STRIDE = 136
BLOCK = 8192  # elements, where none is turned round

# What a call passes: all its threads get the address of one row of whole numbers, and share it.
CALL = (
    *("ticket", "next", "step", "items", "meta", "scratch", "scratch_size"),
    *("failed", "done", "from_end"),
)
_READ = (*CALL[2:7], "from_end")

HEAD = '''\
"""{title}

Written by taskgrad; delete it whenever you like.
"""

import math

import numpy as np
from numba import njit
from numpy import float32, float64, inf, int8, int16, int32, int64, nan, uint8

from taskgrad.kernels import machine as m
from taskgrad.kernels import scalar_math as s


'''


def elementwise_source(
    formula: Formula,
    body: Body,
    kinds: Sequence[Kind],
    stored: Sequence[str],
    results: Sequence[str],
    letters: str,
    title: str,
) -> str:
    """A module with the function ``kernel``.

    Parameters
    ----------
    formula, body, kinds
        What is computed.
    stored, results : sequence of str
        The dtypes of the input tensors and of the output tensors.
    letters : str
        One for each of them: how it lies along the columns, or how it is summed
        (`taskgrad.kernels.summed`).
    title : str
        For the head of the module.
    """
    count, out = formula.arity, len(results)
    outputs = list(enumerate(results, start=count))
    sums = summed.Lines(
        [(k, letters[k], name) for k, name in outputs if letters[k] in summed.LETTERS],
        slot_size() * letters.count("t"),
    )
    streams = streamed.Streams(
        [(k, name) for k, name in outputs if letters[k] == streamed.LETTER],
        scratch_of(letters.replace(streamed.LETTER, "u")),
    )
    sizes = [SIZES[name] for name in (*stored, *results)]
    lines = entry([f"p{k}" for k in range(count + out)])
    lines += streams.start()
    lines += _block(letters, sizes)
    lines += _turned_round(stored, letters)
    lines += sums.start()
    lines += ["        for r in range(r1 - r0):"]
    for k in range(count + out):
        lines.append(f"            o{k} = q{k} + r * rs{k} * {sizes[k]}")
    for slot, k in enumerate(_turned(letters)):
        lines.append(f"            o{k} = scratch + {slot_size() * slot} + r * {TILE_STRIDE * 8}")
    arguments = [_argument(k, name, kinds[k], letters[k]) for k, name in enumerate(stored)]
    once = [text for text, letter in zip(arguments, letters, strict=False) if letter == "z"]
    lines += [f"            {text}" for text in once]
    element = [text for text in arguments if text not in once] + body.lines()
    past = {}
    for k, name in outputs:
        value = body.result(k - count, name)
        if letters[k] in summed.LETTERS:
            element.append(sums.element(k, value))
        elif letters[k] == streamed.LETTER:
            past[k] = value
        else:
            index = "i" if letters[k] == "u" else f"i * cs{k}"
            element.append(f"m.store_{name}(o{k}, {index}, {value})")
    if past:
        lines += streams.row(element, past)
    else:
        lines += ["            for i in range(n):", *(f"                {x}" for x in element)]
    lines += [*sums.row(), *sums.end(), *streams.end()]
    return HEAD.format(title=title) + "\n".join(lines) + "\n"


def _block(letters: str, sizes: Sequence[int]) -> list[str]:
    """Take the next block: its rows `r0` to `r1`, its `n` columns, where each operand begins."""
    operands = range(len(letters))
    lines = [f"    {name} = m.load_int64(meta, {i})" for i, name in enumerate(HEADER)]
    for k in operands:
        lines.append(f"    rs{k} = m.load_int64(meta, {len(HEADER) + k})")
        lines.append(f"    cs{k} = m.load_int64(meta, {len(HEADER) + len(letters) + k})")
    base, step = len(HEADER) + 2 * len(letters), 1 + len(letters)
    lines += [
        *ITEMS,
        "        rest = item // col_blocks",
        "        cb = item - rest * col_blocks",
        "        rb = rest % row_blocks",
        "        rest = rest // row_blocks",
        "        c0, r0 = cb * col_block, rb * row_block",
        "        n = min(col_block, cols - c0)",
        "        r1 = min(rows, r0 + row_block)",
    ]
    for k, letter in enumerate(letters):
        row, col = "rb" if letter in "rb" else "r0", "cb" if letter in "cb" else "c0"
        lines.append(f"        q{k} = p{k} + ({row} * rs{k} + {col} * cs{k}) * {sizes[k]}")
    lines += [
        "        for d in range(depth):",
        f"            at = {base} + d * {step}",
        "            size = m.load_int64(meta, at)",
        "            k = rest % size",
        "            rest = rest // size",
    ]
    return lines + [
        f"            q{k} += k * m.load_int64(meta, at + {k + 1}) * {sizes[k]}" for k in operands
    ]


def entry(addresses: Sequence[str]) -> list[str]:
    """The first lines of a kernel: what each thread reads of the call whose address it gets."""
    lines = ["def kernel(call):"]
    lines += [
        f"    {name} = m.load_int64(call, {i})" for i, name in enumerate(CALL) if name in _READ
    ]
    lines.append(f"    scratch += m.take(call, {CALL.index('ticket')}, 1) * scratch_size")
    addressed = enumerate(addresses, start=len(CALL))
    lines += [f"    {name} = m.load_int64(call, {i})" for i, name in addressed]
    return [*lines, "    item, last = -1, 0"]


# A thread goes over the items it took, and takes the next ones until there are none; the last ones
# first, if so called, but always forwards among those it took, as processors read ahead.
ITEMS = (
    "    while True:",
    "        item += 1",
    "        if item >= last:",
    f"            item = m.take(call, {CALL.index('next')}, step)",
    "            if item >= items:",
    "                break",
    "            last = min(items, item + step)",
    "            if from_end:",
    "                item, last = items - last, items - item",
)


def scratch_of(letters: str) -> int:
    """Bytes of scratch memory that a thread needs."""
    return (
        letters.count("t") * slot_size()
        + sum(summed.SCRATCH for x in letters if x in summed.LETTERS)
        + letters.count(streamed.LETTER) * streamed.SCRATCH
    )


def slot_size() -> int:
    """Bytes of scratch memory for one operand that is turned round."""
    return TILE * TILE_STRIDE * 8


def _turned(letters: str) -> list[int]:
    return [k for k, letter in enumerate(letters) if letter == "t"]


def _turned_round(stored: Sequence[str], letters: str) -> list[str]:
    """Copy blocks of operands that lie along the rows, reading them as they lie."""
    lines = []
    for slot, k in enumerate(_turned(letters)):
        name, size, width = stored[k], SIZES[stored[k]], TILE_STRIDE * 8
        place = slot_size() * slot
        lines += [
            "        tall, wide = (r1 - r0) // 8 * 8, n // 8 * 8",
            "        for c in range(0, wide, 8):",
            "            for r in range(0, tall, 8):",
            f"                o{k} = q{k} + (c * cs{k} + r) * {size}",
            f"                w{k} = scratch + {place} + r * {width} + c * {size}",
            f"                m.turn_{name}(o{k}, cs{k} * {size}, w{k}, {width})",
            "        for c in range(n):",
            f"            o{k} = q{k} + c * cs{k} * {size}",
            f"            w{k} = scratch + {place} + c * {size}",
            "            for r in range(tall if c < wide else 0, r1 - r0):",
            f"                m.put_{name}(w{k}, r * {width // size}, m.load_{name}(o{k}, r))",
        ]
    return lines


def _argument(k: int, stored: str, kind: Kind, letter: str) -> str:
    index = {"u": "i", "z": "0", "s": f"i * cs{k}", "t": "i"}[letter]
    value = f"m.load_{stored}(o{k}, {index})"
    return f"a{k} = {cast(value, Kind(stored).computed, kind.computed)}"
