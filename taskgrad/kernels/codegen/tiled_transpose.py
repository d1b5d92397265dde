"""Operands that lie across: their neighbours in memory follow one another along the rows.

Such an operand's letter is ``t``. Its block is a tile, of which one strip after the other, as many
rows as a cache line has elements, is transposed in registers to scratch memory that stays in the
first cache, and read from there.

A processor foresees neither lines that lie a whole row of memory apart nor what comes after the end
of a page. So while one tile is computed, the next one's lines are asked for, those of operands and
results that lie straight as well. Evenly over the tile, as a core waits where it asks for more than
a few dozen at once; but for all of a column together, which memory hands out faster.

Where results go past the caches (`codegen.nontemporal`), a tile's rows begin and end with the
result's lines, up to a line later than the tile's columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.kernels.ir.dtypes import SIZES

LETTER = "t"
ROWS, COLUMNS = 64, 128
WIDE = 256  # columns, where results go past the caches
SIDE = 8  # rows and columns that are transposed at once
LINE = 64  # bytes
# Elements of a row of scratch memory: rows do not fall on the same cache lines.
_WIDTH = WIDE + LINE + SIDE
SCRATCH = LINE * _WIDTH  # bytes for one operand: a strip, whatever an element's size


class Tiles:
    """Writes what a kernel does for the operands that lie across.

    Parameters
    ----------
    letters : str
        Of inputs and outputs.
    stored : sequence of str
        Their dtypes.
    inputs : int
        How many of them are inputs.
    beyond : int
        Columns that a row may go beyond the tile's.
    """

    def __init__(self, letters: str, stored: Sequence[str], inputs: int, beyond: int) -> None:
        self._across = [k for k, letter in enumerate(letters) if letter == LETTER]
        self._straight = [k for k, x in enumerate(letters) if x == "u" and self._across]
        self._sizes = [SIZES[name] for name in stored]
        self._strip_rows = LINE // max((self._sizes[k] for k in self._across), default=1)
        self._stored, self._inputs, self._beyond = stored, inputs, beyond

    def block(self) -> list[str]:
        """Before a block's first row: how many bytes away each operand's next tile begins."""
        if not self._across:
            return []
        return [
            f"        reach = min(n + {self._beyond}, cols - c0)",
            f"        strips = -(-(r1 - r0) // {self._strip_rows})",
            "        right, down = col_block, 0",
            "        if cb + 1 == col_blocks:",
            "            right, down = -c0, row_block",
            *(
                f"        next{k} = (down * rs{k} + right * cs{k}) * {self._sizes[k]}"
                for k in sorted(self._across + self._straight)
            ),
        ]

    def row(self) -> list[str]:
        """Before row `r` of a block is computed, each operand's place `o` known."""
        lines: list[str] = []
        start = LINE if self._beyond else 0  # the rows go on into the line after the tile's
        for k in self._straight:
            lines += [
                f"for i in range({start}, n * {self._sizes[k]} + {start}, {LINE}):",
                f"    m.ahead_{'read' if k < self._inputs else 'write'}(o{k} + next{k} + i)",
            ]
        if self._across:
            lines += [
                f"if r % {self._strip_rows} == 0:",
                f"    tall, wide = min({self._strip_rows}, r1 - r0 - r), reach - reach % {SIDE}",
                f"    whole = tall - tall % {SIDE}",
            ]
        for slot, k in enumerate(self._across):
            lines += [f"    {line}" for line in self._strip(slot, k)]
        for slot, k in enumerate(self._across):
            row = f"r % {self._strip_rows} * {_WIDTH * self._sizes[k]}"
            lines.append(f"o{k} = scratch + {SCRATCH * slot} + {row}")
        return [f"            {line}" for line in lines]

    def _strip(self, slot: int, k: int) -> list[str]:
        name, size = self._stored[k], self._sizes[k]
        column = [
            f"    o{k} = q{k} + (c * cs{k} + r) * {size}",
            f"    w{k} = scratch + {SCRATCH * slot} + c * {size}",
        ]
        width = _WIDTH * size
        # Of each 8 columns, each strip asks for its own; and for the lines' last elements, as the
        # tiles above have asked for a first line that they share.
        return [
            f"ahead = next{k} + {LINE - size} - r * {size}",
            f"for c in range(0, wide, {SIDE}):",
            *column,
            f"    ask = r // {self._strip_rows}",
            f"    while ask < {SIDE}:",
            f"        m.ahead_column_{name}(o{k} + ahead + ask * cs{k} * {size})",
            "        ask += strips",
            f"    for i in range(0, whole, {SIDE}):",
            f"        source, target = o{k} + i * {size}, w{k} + i * {width}",
            f"        m.turn_{name}(source, cs{k} * {size}, target, {width})",
            "for c in range(0 if whole < tall else wide, reach):",
            *column,
            "    for i in range(whole if c < wide else 0, tall):",
            f"        m.put_{name}(w{k}, i * {_WIDTH}, m.load_{name}(o{k}, i))",
        ]
