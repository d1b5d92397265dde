"""Outputs written with non-temporal stores, which bypass the caches.

An ordinary store to a line that no cache holds first reads that line from memory, and evicts
others. For an output larger than the caches both are wasted. Non-temporal stores avoid them but
must write whole cache lines: so a row is computed piece by piece in scratch memory, which stays in
the L1 cache, and each piece is then copied with such stores. The elements before the row's first
whole line and after its last piece are stored normally.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from taskgrad.kernels.codegen.access import CACHE_LINE, SUMS, Access
from taskgrad.kernels.ir.dtypes import SIZES

PIECE = 64  # elements; of the smallest dtypes that is one line
SCRATCH = PIECE * 8
_SHORTEST_ROW = 4 * PIECE
_UNKNOWN_CACHE = 32 << 20
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def with_nontemporal(
    accesses: tuple[Access, ...], outputs: Sequence[tuple[int, str]], columns: int, touched: int
) -> tuple[Access, ...]:
    """The accesses, with non-temporal stores for outputs that profit from them.

    `outputs` are operands' indices and dtypes, `columns` the elements of a row. If the `touched`
    bytes, all that a call reads and writes, fit in the last-level cache, ordinary stores remain:
    the next operation finds the result there.
    """
    unit = [(k, SIZES[name]) for k, name in outputs if accesses[k] == Access.UNIT]
    if not unit or columns < _SHORTEST_ROW or touched <= last_level_cache():
        return accesses
    if Access.TRANSPOSED in accesses and SUMS.intersection(accesses):
        return accesses  # partial sums need rows that end with the tile's columns
    # Cache lines of several outputs begin at the same element only if these have one size.
    chosen = {k for k, size in unit if size == unit[0][1]}
    return tuple(Access.NONTEMPORAL if k in chosen else a for k, a in enumerate(accesses))


@cache
def last_level_cache() -> int:
    """Bytes of this machine's L3 cache as Linux reports them, else 32 MiB."""
    try:
        return int(_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _UNKNOWN_CACHE


class NontemporalCode:
    """Generates the rows of a kernel whose outputs, given by index and dtype, bypass the caches.

    `scratch` is the offset of their scratch memory.
    """

    def __init__(self, outputs: Sequence[tuple[int, str]], scratch: int) -> None:
        self._outputs = [(k, name, scratch + SCRATCH * i) for i, (k, name) in enumerate(outputs)]

    def before_loop(self) -> list[str]:
        """Set the addresses of scratch memory."""
        return [f"    w{k} = scratch + {offset}" for k, _, offset in self._outputs]

    @property
    def overhang(self) -> int:
        """Elements that a row in a tile may extend beyond the tile: at most those of a line."""
        return CACHE_LINE // SIZES[self._outputs[0][1]] if self._outputs else 0

    def row(self, element: Sequence[str], values: dict[int, str], in_tiles: bool) -> list[str]:
        """A row of `n` elements: `element` computes the i-th, `values` is what each operand stores.

        Rows in tiles begin and end at cache lines: tiles are so narrow that partial lines matter.
        """
        k, name, _ = self._outputs[0]
        lines = [f"lead = (-o{k} & {CACHE_LINE - 1}) // {SIZES[name]}", "begin, end = 0, n"]
        if in_tiles:
            lines += [
                "if c0 > 0:",
                "    begin = min(n, lead)",
                "end = min(n + lead, cols - c0) if cb + 1 < col_blocks else n",
            ]
        lines.append("first = min(end, lead)")
        # In memory from elsewhere (torch.frombuffer) no element may begin at a cache line.
        lines.append(f"first = end if o{k} & {SIZES[name] - 1} else first")
        for other, _, _ in self._outputs[1:]:  # its lines may begin at other elements
            lines.append(f"first = end if (o{k} ^ o{other}) & {CACHE_LINE - 1} else first")
        lines += [
            f"rest = end - (end - first) % {PIECE}",
            "for edge in range(2):",
            "    start, stop = (begin, first) if edge == 0 else (rest, end)",
            "    for i in range(start, stop):",
            *(f"        {line}" for line in element),
            *(f"        m.store_{n}(o{j}, i, {values[j]})" for j, n, _ in self._outputs),
            f"for at in range(first, rest, {PIECE}):",
            f"    for i in range(at, at + {PIECE}):",
            *(f"        {line}" for line in element),
            *(f"        m.store_{n}(w{j}, i - at, {values[j]})" for j, n, _ in self._outputs),
            *(f"    m.stream_{n}(w{j}, o{j} + at * {SIZES[n]})" for j, n, _ in self._outputs),
        ]
        return [f"            {line}" for line in lines]

    def after_loop(self) -> list[str]:
        """A fence: non-temporal stores are weakly ordered."""
        return ["    m.fence()"] if self._outputs else []
