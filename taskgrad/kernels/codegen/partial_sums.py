"""Outputs that are summed over dimensions while they are computed: gradients of what was broadcast.

A block adds its elements up in a row of scratch memory and leaves one partial sum; the partial sums
are a small tensor, which is reduced afterwards. So the elements themselves are never written to
memory, and the shapes alone decide the bits. An output's letter says what a block leaves:

====== =======================================================================================
letter meaning
====== =======================================================================================
r      one row: the sum over its rows
c      one column: the sum over its columns
b      one number
====== =======================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

LETTERS = "rcb"
COLUMNS = 2_048  # of a block, at most
_GROUP = 16  # rows added up one after another before they are added to the total
_ROW = COLUMNS * 8
SCRATCH = 2 * _ROW  # bytes an output: a group's row and the total's


@dataclass(frozen=True)
class Partial:
    """The partial sums of one output, and what becomes of them.

    Attributes
    ----------
    shape : tuple of int
        Dimensions of the loop, the outermost first; those summed have one element a block.
    summed : tuple of int
        Which of them are still to be reduced.
    strides : tuple of int
        Of the others, in the output.
    own : tuple of int
        The output's shape.
    """

    shape: tuple[int, ...]
    summed: tuple[int, ...]
    strides: tuple[int, ...]
    own: tuple[int, ...]

    def placed(self, sums: torch.Tensor) -> torch.Tensor:
        """The reduced partial sums in the output's shape."""
        if sums.is_contiguous() and self.strides == sums.stride():
            return sums.view(self.own)
        out = sums.new_empty(self.own)
        out.as_strided(sums.shape, self.strides).copy_(sums)
        return out


def block_of(cols: int, rows: int, rows_summed: bool) -> tuple[int, int]:
    """Columns and rows of a block: blocks of one width, and rows enough for few partial sums."""
    width = -(-cols // -(-cols // COLUMNS))
    width = min(cols, COLUMNS, -(-width // 16) * 16)
    most = min(max(16_384 // width, 64), 256) if rows_summed else max(1, 8_192 // width)
    return width, min(rows, most)


def partial_of(
    own: tuple[int, ...],
    sizes: Sequence[int],
    strides: Sequence[int],
    blocks: tuple[int, int],
) -> tuple[Partial, list[int], str]:
    """The partial sums, their strides in the loop's dimensions (columns, rows, ...), the letter.

    Parameters
    ----------
    own : tuple of int
        The output's shape.
    sizes, strides : sequences of int
        Of the loop's dimensions; an output's stride is 0 where it is summed.
    blocks : tuple of int
        How many there are along the columns and along the rows.
    """
    counts = [
        n if s else blocks[d] if d < 2 else n
        for d, (n, s) in enumerate(zip(sizes, strides, strict=True))
    ]
    steps = [prod(counts[:d]) for d in range(len(counts))]
    last = len(sizes) - 1
    partial = Partial(
        tuple(reversed(counts)),
        tuple(sorted(last - d for d, s in enumerate(strides) if not s)),
        tuple(s for s in reversed(strides) if s),
        own,
    )
    letter = {(False, False): "b", (False, True): "c", (True, False): "r"}
    return partial, steps, letter.get((bool(strides[0]), bool(strides[1])), "u")


class Lines:
    """Writes what a kernel does for the summed outputs.

    Parameters
    ----------
    letters : sequence of (int, str, str)
        Of each summed output: the number of its operand, its letter, its dtype.
    scratch : int
        Where their scratch memory begins.
    """

    def __init__(self, outputs: Sequence[tuple[int, str, str]], scratch: int) -> None:
        self._outputs = [
            (k, letter, name, scratch + SCRATCH * i) for i, (k, letter, name) in enumerate(outputs)
        ]

    def start(self) -> list[str]:
        """Before a block."""
        lines = []
        for k, letter, name, place in self._outputs:
            lines.append(f"        group{k} = scratch + {place}")
            lines.append(f"        total{k} = scratch + {place + _ROW}")
            if letter in "rb":
                lines.append("        for i in range(n):")
                lines.append(f"            m.put_{name}(group{k}, i, {name}(0))")
                lines.append(f"            m.put_{name}(total{k}, i, {name}(0))")
        return lines

    def element(self, k: int, value: str) -> str:
        """For each element."""
        letter, name = next((letter, name) for j, letter, name, _ in self._outputs if j == k)
        if letter == "c":
            return f"m.keep_{name}(total{k}, i, {value})"
        return f"m.grow_{name}(group{k}, i, {value})"

    def row(self) -> list[str]:
        """After each row."""
        lines = []
        for k, letter, name, _ in self._outputs:
            if letter == "c":
                lines += [f"            {line}" for line in _folded(k, name)]
                lines.append(f"            m.put_{name}(o{k}, 0, m.get_{name}(total{k}, 0))")
            else:
                lines.append(f"            if r % {_GROUP} == {_GROUP - 1}:")
                lines += [f"                {line}" for line in _moved(k, name)]
        return lines

    def end(self) -> list[str]:
        """After a block."""
        lines = []
        for k, letter, name, _ in self._outputs:
            if letter == "c":
                continue
            lines += [f"        {line}" for line in _moved(k, name)]
            if letter == "b":
                lines += [f"        {line}" for line in _folded(k, name)]
                lines.append(f"        m.put_{name}(q{k}, 0, m.get_{name}(total{k}, 0))")
            else:
                lines.append("        for i in range(n):")
                lines.append(f"            m.put_{name}(q{k}, i, m.get_{name}(total{k}, i))")
        return lines


def _moved(k: int, name: str) -> list[str]:
    """The group's row added to the total's, and empty again."""
    return [
        "for i in range(n):",
        f"    m.put_{name}(total{k}, i, m.get_{name}(total{k}, i) + m.get_{name}(group{k}, i))",
        f"    m.put_{name}(group{k}, i, {name}(0))",
    ]


def _folded(k: int, name: str) -> list[str]:
    """The total's row added up in halves."""
    upper = f"m.get_{name}(total{k}, left - half + i)"
    return [
        "left = n",
        "while left > 1:",
        "    half = left // 2",
        "    for i in range(half):",
        f"        m.put_{name}(total{k}, i, m.get_{name}(total{k}, i) + {upper})",
        "    left -= half",
    ]
