"""Results that go past the caches, straight to memory.

An ordinary store to memory that no cache holds reads it first. A result larger than the caches is
thus read for nothing, and what is in the caches makes room for it. A processor has stores without
that (on x86 "non-temporal" ones), which must come as whole cache lines: so a row is computed piece
by piece in scratch memory, which stays in the first cache, and each piece then goes to memory. What
is before the row's first line and after its last piece is stored as ever.

Such a result's letter is ``p``: unit stride, past the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from taskgrad.kernels.codegen import partial_sums, tiled_transpose
from taskgrad.kernels.codegen.tiled_transpose import LINE
from taskgrad.kernels.ir.dtypes import SIZES

LETTER = "p"
PIECE = 64  # elements: of the smallest dtypes, one line
SCRATCH = PIECE * 8
# A row with fewer elements has too few pieces.
_SHORTEST = 4 * PIECE
_UNKNOWN_CACHE = 32 << 20
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def past_caches(
    letters: str, outputs: Sequence[tuple[int, str]], columns: int, touched: int
) -> str:
    """The letters, those of outputs that are to go past the caches replaced.

    Parameters
    ----------
    letters : str
    outputs : sequence of (int, str)
        Which of the letters are outputs, and the dtypes in which they are stored.
    columns : int
        Elements that a row has.
    touched : int
        Bytes that a call reads and writes. If they fit in the last cache, whoever reads the result
        next finds it there.
    """
    straight = [(k, SIZES[name]) for k, name in outputs if letters[k] == "u"]
    if not straight or columns < _SHORTEST or touched <= last_cache():
        return letters
    if tiled_transpose.LETTER in letters and set(letters) & set(partial_sums.LETTERS):
        return letters  # a sum takes the tile's columns, and no others
    # Lines of several outputs begin at the same element only if these have one size.
    size = straight[0][1]
    chosen = {k for k, other in straight if other == size}
    return "".join(LETTER if k in chosen else letter for k, letter in enumerate(letters))


@cache
def last_cache() -> int:
    """Bytes of this machine's largest cache, as Linux tells; 32 MiB where it does not."""
    try:
        return int(_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _UNKNOWN_CACHE


class Streams:
    """Writes what a kernel does for the outputs that go past the caches.

    Parameters
    ----------
    outputs : sequence of (int, str)
        Of each the number of its operand and its dtype.
    scratch : int
        Where their scratch memory begins.
    """

    def __init__(self, outputs: Sequence[tuple[int, str]], scratch: int) -> None:
        self._outputs = [(k, name, scratch + SCRATCH * i) for i, (k, name) in enumerate(outputs)]

    def start(self) -> list[str]:
        """Before the first block."""
        return [f"    w{k} = scratch + {place}" for k, _, place in self._outputs]

    @property
    def beyond(self) -> int:
        """Elements that a row in a tile may have beyond the tile's: those of a line, or fewer."""
        return LINE // SIZES[self._outputs[0][1]] if self._outputs else 0

    def row(self, element: Sequence[str], stores: dict[int, str], in_tiles: bool) -> list[str]:
        """A row of `n` elements, of which number `i` is computed by these lines.

        The values to be stored are `stores`, by operand. Tiles are so narrow that lines shared by
        two of them would count, so there a row begins and ends with a line.
        """
        k, name, _ = self._outputs[0]
        lines = [f"lead = (-o{k} & {LINE - 1}) // {SIZES[name]}", "begin, end = 0, n"]
        if in_tiles:
            lines += [
                "if c0 > 0:",
                "    begin = min(n, lead)",
                "end = min(n + lead, cols - c0) if cb + 1 < col_blocks else n",
            ]
        lines.append("first = min(end, lead)")
        # Memory from elsewhere (torch.frombuffer) may have no element on the beginning of a line.
        lines.append(f"first = end if o{k} & {SIZES[name] - 1} else first")
        for other, _, _ in self._outputs[1:]:  # their lines may begin elsewhere
            lines.append(f"first = end if (o{k} ^ o{other}) & {LINE - 1} else first")
        lines += [
            f"rest = end - (end - first) % {PIECE}",
            "for edge in range(2):",
            "    start, stop = (begin, first) if edge == 0 else (rest, end)",
            "    for i in range(start, stop):",
            *(f"        {line}" for line in element),
            *(f"        m.store_{n}(o{j}, i, {stores[j]})" for j, n, _ in self._outputs),
            f"for at in range(first, rest, {PIECE}):",
            f"    for i in range(at, at + {PIECE}):",
            *(f"        {line}" for line in element),
            *(f"        m.store_{n}(w{j}, i - at, {stores[j]})" for j, n, _ in self._outputs),
            *(f"    m.stream_{n}(w{j}, o{j} + at * {SIZES[n]})" for j, n, _ in self._outputs),
        ]
        return [f"            {line}" for line in lines]

    def end(self) -> list[str]:
        """After the last block: such stores are not in order with others by themselves."""
        return ["    m.fence()"] if self._outputs else []
