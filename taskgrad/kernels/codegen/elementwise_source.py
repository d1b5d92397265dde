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
t      unit stride along the rows: transposed in scratch memory (`codegen.tiled_transpose`)
p      an output of unit stride that bypasses the caches (`codegen.nontemporal`)
====== =======================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.kernels.codegen import nontemporal, partial_sums, tiled_transpose
from taskgrad.kernels.codegen.scalar_code import Body, cast
from taskgrad.kernels.codegen.work_stealing import FAILED, ITEMS, ZERO_DIVISION, entry
from taskgrad.kernels.ir.dtypes import SIZES, Kind
from taskgrad.kernels.ir.expression import Formula

# The numbers that a layout passes to a kernel, in this order, before sizes and strides.
HEADER = ("depth", "rows", "cols", "row_block", "col_block", "row_blocks", "col_blocks")
BLOCK = 8192  # elements, where none is turned round

HEAD = '''\
"""{title}

Written by taskgrad; delete it whenever you like.
"""

import math

import numpy as np
from numba import njit
from numpy import float32, float64, inf, int8, int16, int32, int64, nan, uint8

from taskgrad.kernels.codegen import arithmetic as ar
from taskgrad.kernels.codegen import intrinsics as m
from taskgrad.kernels.codegen import scalar_math as s


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
        (`taskgrad.kernels.codegen.partial_sums`).
    title : str
        For the head of the module.
    """
    count, out = formula.arity, len(results)
    outputs = list(enumerate(results, start=count))
    sums = partial_sums.Lines(
        [(k, letters[k], name) for k, name in outputs if letters[k] in partial_sums.LETTERS],
        tiled_transpose.SCRATCH * letters.count(tiled_transpose.LETTER),
    )
    streams = nontemporal.Streams(
        [(k, name) for k, name in outputs if letters[k] == nontemporal.LETTER],
        scratch_of(letters.replace(nontemporal.LETTER, "u")),
    )
    tiles = tiled_transpose.Tiles(letters, (*stored, *results), count, streams.beyond)
    sizes = [SIZES[name] for name in (*stored, *results)]
    lines = entry([f"p{k}" for k in range(count + out)])
    lines += ["    zero = False", *streams.start()]
    lines += _block(letters, sizes)
    lines += tiles.block()
    lines += sums.start()
    lines += ["        for r in range(r1 - r0):"]
    for k in range(count + out):
        lines.append(f"            o{k} = q{k} + r * rs{k} * {sizes[k]}")
    lines += tiles.row()
    arguments = [_argument(k, name, kinds[k], letters[k]) for k, name in enumerate(stored)]
    once = [text for text, letter in zip(arguments, letters, strict=False) if letter == "z"]
    lines += [f"            {text}" for text in once]
    element = [text for text in arguments if text not in once] + body.lines()
    before, divides = body.zero_division()
    if divides:
        element += [*before, f"zero = zero | {divides}"]
    past = {}
    for k, name in outputs:
        value = body.result(k - count, name)
        if letters[k] in partial_sums.LETTERS:
            element.append(sums.element(k, value))
        elif letters[k] == nontemporal.LETTER:
            past[k] = value
        else:
            index = "i" if letters[k] == "u" else f"i * cs{k}"
            element.append(f"m.store_{name}(o{k}, {index}, {value})")
    if past:
        lines += streams.row(element, past, in_tiles=tiled_transpose.LETTER in letters)
    else:
        lines += ["            for i in range(n):", *(f"                {x}" for x in element)]
    lines += [*sums.row(), *sums.end(), *streams.end()]
    if divides:
        lines += ["    if zero:", f"        m.store_int64(call, {FAILED}, {ZERO_DIVISION})"]
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


def scratch_of(letters: str) -> int:
    """Bytes of scratch memory that a thread needs."""
    return (
        letters.count(tiled_transpose.LETTER) * tiled_transpose.SCRATCH
        + sum(partial_sums.SCRATCH for x in letters if x in partial_sums.LETTERS)
        + letters.count(nontemporal.LETTER) * nontemporal.SCRATCH
    )


def _argument(k: int, stored: str, kind: Kind, letter: str) -> str:
    index = {"u": "i", "z": "0", "s": f"i * cs{k}", "t": "i"}[letter]
    value = f"m.load_{stored}(o{k}, {index})"
    return f"a{k} = {cast(value, Kind(stored).computed, kind.computed)}"
