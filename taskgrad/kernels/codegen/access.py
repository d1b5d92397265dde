"""How the inner loop of an elementwise kernel accesses each operand."""

from __future__ import annotations

from enum import StrEnum

CACHE_LINE = 64  # bytes


class Access(StrEnum):
    """The access pattern of one operand along a row; part of the source, so that LLVM knows it.

    `Vectorized.explain` shows the letters.
    """

    UNIT = "u"  # stride 1
    SCALAR = "z"  # stride 0: one element for the whole row
    STRIDED = "s"  # any other stride
    TRANSPOSED = "t"  # an input with stride 1 along the columns (`tiled_transpose`)
    NONTEMPORAL = "p"  # an output with stride 1, stored past the caches (`nontemporal`)
    SUM_ROWS = "r"  # an output summed over a block's rows (`partial_sums`)
    SUM_COLUMNS = "c"  # over its columns
    SUM_BLOCK = "b"  # over both


SUMS = {Access.SUM_ROWS, Access.SUM_COLUMNS, Access.SUM_BLOCK}
