"""Outputs that a kernel sums over dimensions as it computes them: gradients of broadcast inputs.

The elements are never written to memory. Each block leaves a row, a column or one number (see
`Access`); these partial sums form a small tensor, which is reduced afterwards. The shapes alone
determine the order of the additions, hence the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from taskgrad.kernels.codegen.access import Access

COLUMNS = 2_048  # of a block, at most
_GROUP = 16  # rows that are added up before they are added to the total
_ROW = COLUMNS * 8
SCRATCH = 2 * _ROW  # bytes an output: the group's row and the total's
_ACCESS = {
    (False, False): Access.SUM_BLOCK,
    (False, True): Access.SUM_COLUMNS,
    (True, False): Access.SUM_ROWS,
    (True, True): Access.UNIT,  # only outer dimensions are summed
}


@dataclass(frozen=True)
class Partial:
    """The tensor of partial sums of one output."""

    shape: tuple[int, ...]  # the loop's, outermost first; summed dimensions: one element a block
    summed: tuple[int, ...]  # dimensions that are still to be reduced
    strides: tuple[int, ...]  # of the other dimensions, in the output
    out_shape: tuple[int, ...]

    def to_output(self, sums: torch.Tensor) -> torch.Tensor:
        """The reduced partial sums in the output's shape."""
        if sums.is_contiguous() and self.strides == sums.stride():
            return sums.view(self.out_shape)
        out = sums.new_empty(self.out_shape)
        out.as_strided(sums.shape, self.strides).copy_(sums)
        return out


def block_of(cols: int, rows: int, rows_summed: bool) -> tuple[int, int]:
    """Rows and columns of a block: equal widths, and enough rows for few partial sums."""
    width = -(-cols // -(-cols // COLUMNS))
    width = min(cols, COLUMNS, -(-width // 16) * 16)
    most = min(max(16_384 // width, 64), 256) if rows_summed else max(1, 8_192 // width)
    return min(rows, most), width


def partial_of(
    out_shape: tuple[int, ...],
    sizes: Sequence[int],
    strides: Sequence[int],
    blocks: tuple[int, int],
) -> tuple[Partial, list[int], Access]:
    """The partial sums, their strides in the loop's dimensions, and their access.

    The loop's dimensions are columns, rows, ...; an output's stride is 0 where it is summed.
    `blocks` are the numbers of blocks along the columns and along the rows.
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
        out_shape,
    )
    return partial, steps, _ACCESS[bool(strides[0]), bool(strides[1])]


class PartialSumCode:
    """Generates the lines that accumulate summed outputs, given by index, access and dtype.

    `scratch` is the offset of their scratch memory.
    """

    def __init__(self, outputs: Sequence[tuple[int, Access, str]], scratch: int) -> None:
        self._accesses = {k: (access, name) for k, access, name in outputs}
        self._scratch = scratch

    def before_block(self) -> list[str]:
        """Set the addresses of scratch memory, and clear it."""
        lines = []
        for i, (k, (access, name)) in enumerate(self._accesses.items()):
            offset = self._scratch + SCRATCH * i
            lines.append(f"        group{k} = scratch + {offset}")
            lines.append(f"        total{k} = scratch + {offset + _ROW}")
            if access != Access.SUM_COLUMNS:
                lines.append("        for i in range(n):")
                lines.append(f"            m.put_{name}(group{k}, i, {name}(0))")
                lines.append(f"            m.put_{name}(total{k}, i, {name}(0))")
        return lines

    def element(self, k: int, value: str) -> str:
        """Accumulate element ``i``."""
        access, name = self._accesses[k]
        if access == Access.SUM_COLUMNS:
            return f"m.put_sum_{name}(total{k}, i, {value})"
        return f"m.add_to_{name}(group{k}, i, {value})"

    def after_row(self) -> list[str]:
        """Reduce the row, or add a complete group to the total."""
        lines = []
        for k, (access, name) in self._accesses.items():
            if access == Access.SUM_COLUMNS:
                lines += [f"            {line}" for line in _halve(k, name)]
                lines.append(f"            m.put_{name}(o{k}, 0, m.get_{name}(total{k}, 0))")
            else:
                lines.append(f"            if r % {_GROUP} == {_GROUP - 1}:")
                lines += [f"                {line}" for line in _flush(k, name)]
        return lines

    def after_block(self) -> list[str]:
        """Write the block's partial sums."""
        lines = []
        for k, (access, name) in self._accesses.items():
            if access == Access.SUM_COLUMNS:
                continue
            lines += [f"        {line}" for line in _flush(k, name)]
            if access == Access.SUM_BLOCK:
                lines += [f"        {line}" for line in _halve(k, name)]
                lines.append(f"        m.put_{name}(q{k}, 0, m.get_{name}(total{k}, 0))")
            else:
                lines.append("        for i in range(n):")
                lines.append(f"            m.put_{name}(q{k}, i, m.get_{name}(total{k}, i))")
        return lines


def _flush(k: int, name: str) -> list[str]:
    """Add the group's row to the total's, and clear it."""
    return [
        "for i in range(n):",
        f"    m.put_{name}(total{k}, i, m.get_{name}(total{k}, i) + m.get_{name}(group{k}, i))",
        f"    m.put_{name}(group{k}, i, {name}(0))",
    ]


def _halve(k: int, name: str) -> list[str]:
    """Reduce the total's row pairwise: its second half is added to its first until one is left."""
    upper = f"m.get_{name}(total{k}, left - half + i)"
    return [
        "left = n",
        "while left > 1:",
        "    half = left // 2",
        "    for i in range(half):",
        f"        m.put_{name}(total{k}, i, m.get_{name}(total{k}, i) + {upper})",
        "    left -= half",
    ]
