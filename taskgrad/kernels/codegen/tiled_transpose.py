"""Operands with stride 1 along the columns of a kernel's loop: transposed in tiles.

A block of the loop is a tile. It is processed in strips of as many rows as a cache line has
elements; each strip is transposed in registers, 8 by 8, into scratch memory that stays in the L1
cache, and is read from there.

Hardware prefetchers follow neither large strides nor page boundaries, so the kernel prefetches the
next tile itself, also of the operands with unit stride. Prefetches are spread over the tile, since
a core stalls if more than a few dozen are outstanding; but those of one column are issued together,
which DRAM serves faster.

If outputs are stored past the caches (`codegen.nontemporal`), a tile's rows begin and end at the
output's cache lines, up to a line later than the tile's columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskgrad.kernels.codegen.access import CACHE_LINE, Access
from taskgrad.kernels.ir.dtypes import SIZES

ROWS, COLUMNS = 64, 128
NONTEMPORAL_COLUMNS = 256  # if an output is stored past the caches
SIDE = 8  # rows and columns that are transposed at once
# Elements of a row of scratch memory, so that rows do not fall on the same cache lines.
_WIDTH = NONTEMPORAL_COLUMNS + CACHE_LINE + SIDE
SCRATCH = CACHE_LINE * _WIDTH  # bytes for an operand's strip, whatever an element's size


class TransposeCode:
    """Generates the lines that transpose operands and prefetch tiles.

    Accesses and dtypes (in memory) are those of inputs and outputs; the first `inputs` are inputs.
    A row may extend `overhang` columns beyond the tile's.
    """

    def __init__(
        self, accesses: Sequence[Access], dtypes: Sequence[str], inputs: int, overhang: int
    ) -> None:
        self._transposed = [k for k, a in enumerate(accesses) if a == Access.TRANSPOSED]
        self._unit = [k for k, a in enumerate(accesses) if a == Access.UNIT and self._transposed]
        self._sizes = [SIZES[name] for name in dtypes]
        self._strip_rows = CACHE_LINE // max((self._sizes[k] for k in self._transposed), default=1)
        self._dtypes, self._inputs, self._overhang = dtypes, inputs, overhang

    def before_block(self) -> list[str]:
        """Compute each operand's distance in bytes to the next tile."""
        if not self._transposed:
            return []
        return [
            f"        reach = min(n + {self._overhang}, cols - c0)",
            f"        strips = -(-(r1 - r0) // {self._strip_rows})",
            "        right, down = col_block, 0",
            "        if cb + 1 == col_blocks:",
            "            right, down = -c0, row_block",
            *(
                f"        next{k} = (down * rs{k} + right * cs{k}) * {self._sizes[k]}"
                for k in sorted(self._transposed + self._unit)
            ),
        ]

    def before_row(self) -> list[str]:
        """Prefetch, transpose the next strip if row `r` begins one, and set each address `o`."""
        lines: list[str] = []
        start = CACHE_LINE if self._overhang else 0
        for k in self._unit:
            lines += [
                f"for i in range({start}, n * {self._sizes[k]} + {start}, {CACHE_LINE}):",
                f"    m.prefetch_{'read' if k < self._inputs else 'write'}(o{k} + next{k} + i)",
            ]
        if self._transposed:
            lines += [
                f"if r % {self._strip_rows} == 0:",
                f"    tall, wide = min({self._strip_rows}, r1 - r0 - r), reach - reach % {SIDE}",
                f"    whole = tall - tall % {SIDE}",
            ]
        for slot, k in enumerate(self._transposed):
            lines += [f"    {line}" for line in self._strip(slot, k)]
        for slot, k in enumerate(self._transposed):
            row = f"r % {self._strip_rows} * {_WIDTH * self._sizes[k]}"
            lines.append(f"o{k} = scratch + {SCRATCH * slot} + {row}")
        return [f"            {line}" for line in lines]

    def _strip(self, slot: int, k: int) -> list[str]:
        dtype, size = self._dtypes[k], self._sizes[k]
        column = [
            f"    o{k} = q{k} + (c * cs{k} + r) * {size}",
            f"    w{k} = scratch + {SCRATCH * slot} + c * {size}",
        ]
        width = _WIDTH * size
        # Each strip prefetches its share of every 8 columns. The address is that of a line's last
        # element: a first line shared with the tile above was prefetched for that one.
        return [
            f"ahead = next{k} + {CACHE_LINE - size} - r * {size}",
            f"for c in range(0, wide, {SIDE}):",
            *column,
            f"    ask = r // {self._strip_rows}",
            f"    while ask < {SIDE}:",
            f"        m.prefetch_column_{dtype}(o{k} + ahead + ask * cs{k} * {size})",
            "        ask += strips",
            f"    for i in range(0, whole, {SIDE}):",
            f"        source, target = o{k} + i * {size}, w{k} + i * {width}",
            f"        m.transpose_{dtype}(source, cs{k} * {size}, target, {width})",
            "for c in range(0 if whole < tall else wide, reach):",
            *column,
            "    for i in range(whole if c < wide else 0, tall):",
            f"        m.put_{dtype}(w{k}, i * {_WIDTH}, m.load_{dtype}(o{k}, i))",
        ]
