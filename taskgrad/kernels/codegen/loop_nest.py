"""In which order a kernel goes through memory: broadcasting, the order of dimensions, blocks. Pure.

As torch's own iterator does, dimensions are ordered by the strides of the operands, the first
operand counting first, and those that lie in one row are joined into one. A result that is made
gets its strides in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from taskgrad.kernels.codegen import tiled_transpose
from taskgrad.kernels.codegen.elementwise_source import BLOCK, HEADER
from taskgrad.kernels.codegen.partial_sums import Partial, block_of, partial_of

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a kernel goes through its operands.

    Attributes
    ----------
    shape, out_strides : tuple of int
        Of the result.
    letters : str
        How each operand lies along the columns; see `taskgrad.kernels.codegen.elementwise_source`.
    meta : tuple of int
        What the kernel reads.
    items : int
        How many blocks there are.
    block : int
        Elements of a block.
    partials : tuple of (Partial or None)
        For each output: how it is summed, if it is.
    """

    shape: Ints
    out_strides: Ints
    letters: str
    meta: Ints
    items: int
    block: int
    partials: tuple[Partial | None, ...]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.meta[HEADER.index("cols")]


def broadcast(shapes: Sequence[Ints]) -> Ints:
    """The common shape.

    Raises
    ------
    ValueError
        The shapes do not fit; the message names the dimension.
    """
    rank = max(map(len, shapes), default=0)
    common = [1] * rank
    for shape in shapes:
        for d, size in enumerate(shape, start=rank - len(shape)):
            if size != 1 and common[d] not in (1, size):
                shown = " and ".join(str(s) for s in dict.fromkeys(map(tuple, shapes)))
                raise ValueError(
                    f"shapes {shown} do not broadcast: "
                    f"dimension {d - rank} is {common[d]} and {size}"
                )
            if size != 1:
                common[d] = size
    return tuple(common)


def aligned(shape: Ints, own: Ints, strides: Ints) -> Ints:
    """Strides of a tensor as if it had the common shape: 0 where it is repeated."""
    missing = len(shape) - len(own)
    return (0,) * missing + tuple(
        0 if size == 1 != whole else stride
        for size, stride, whole in zip(own, strides, shape[missing:], strict=True)
    )


def layout(
    operands: Sequence[tuple[Ints, Ints]],
    out: tuple[Ints, Ints] | None,
    outputs: int,
    sums: Sequence[Ints | None] = (),
    tile_columns: int = tiled_transpose.COLUMNS,
) -> Layout:
    """The layout for inputs of these shapes and strides.

    Parameters
    ----------
    operands : sequence of (shape, strides)
    out : (shape, strides) or None
        Of the result, if there is one already.
    outputs : int
        How many there are.
    sums : sequence of (shape or None)
        For each output the shape to which it is summed, if it is.
    tile_columns : int
        Of a block, where operands lie across.

    Raises
    ------
    ValueError
        The shapes do not broadcast together.
    """
    shape = broadcast([s for s, _ in operands])
    strides = [aligned(shape, own, given) for own, given in operands]
    known = [*([out[1]] if out else []), *strides]
    order = _order(shape, known)
    out_strides = out[1] if out else _dense(shape, order)
    sums = sums or [None] * outputs
    rows = [
        *strides,
        *(out_strides if own is None else aligned(shape, own, contiguous(own)) for own in sums),
    ]
    sizes, joined = _join([shape[d] for d in order], [[s[d] for d in order] for s in rows])
    return _blocks(shape, out_strides, sizes, joined, sums, tile_columns)


def strides_of_result(operands: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Shape and strides of the result that `layout` makes."""
    shape = broadcast([s for s, _ in operands])
    strides = [aligned(shape, own, given) for own, given in operands]
    return shape, _dense(shape, _order(shape, strides))


def contiguous(shape: Ints) -> Ints:
    """The strides of a tensor that lies in memory row by row."""
    return _dense(shape, list(reversed(range(len(shape)))))


def _order(shape: Ints, operands: Sequence[Ints]) -> list[int]:
    """Dimensions from the innermost to the outermost: an insertion sort, since ties say nothing."""
    order = list(reversed(range(len(shape))))
    for i in range(1, len(order)):
        at = i
        for before in range(i - 1, -1, -1):
            verdict = _compare(shape, operands, order[before], order[at])
            if verdict > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif verdict < 0:
                break
    return order


def _compare(shape: Ints, operands: Sequence[Ints], a: int, b: int) -> int:
    for strides in operands:
        if strides[a] == 0 or strides[b] == 0:
            continue
        if strides[a] != strides[b]:
            return -1 if strides[a] < strides[b] else 1
        if shape[a] > shape[b]:
            return 1
    return 0


def _dense(shape: Ints, order: list[int]) -> Ints:
    strides = [0] * len(shape)
    step = 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def _join(sizes: list[int], rows: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Leave out dimensions of size 1 and join neighbours that are one row for every operand."""
    kept: list[int] = []
    joined: list[list[int]] = [[] for _ in rows]
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(r[d] == kept[-1] * j[-1] for r, j in zip(rows, joined, strict=True)):
            kept[-1] *= size
            continue
        kept.append(size)
        for r, j in zip(rows, joined, strict=True):
            j.append(r[d])
    return kept, joined


def _blocks(
    shape: Ints,
    out_strides: Ints,
    sizes: list[int],
    strides: list[list[int]],
    sums: Sequence[Ints | None],
    tile_columns: int,
) -> Layout:
    inputs = len(strides) - len(sums)
    if not sizes or 0 in sizes:
        sizes, strides = [1], [[1] for _ in strides]
    across = [k for k in range(inputs) if _lies_across(sizes, strides[k])]
    if across:
        # The rows: where the first such operand has stride 1.
        d = strides[across[0]].index(1)
        for row in (sizes, *strides):
            row.insert(1, row.pop(d))
        across = [k for k in across if strides[k][1] == 1]
    if len(sizes) == 1:
        sizes, strides = [*sizes, 1], [[*s, 0] for s in strides]
    cols, rows, *outer = sizes
    if across:
        row_block, col_block = tiled_transpose.ROWS, tile_columns
    elif any(own is not None for own in sums):
        over_rows = any(
            own is not None and not s[1] for own, s in zip(sums, strides[inputs:], strict=True)
        )
        col_block, row_block = block_of(cols, rows, over_rows)
    else:
        col_block = min(cols, BLOCK)
        row_block = max(1, min(rows, BLOCK // col_block))
    row_blocks, col_blocks = -(-rows // row_block), -(-cols // col_block)
    partials: list[Partial | None] = []
    summed: dict[int, str] = {}
    for k, own in enumerate(sums, start=inputs):
        partial = None
        if own is not None:
            blocks = col_blocks, row_blocks
            partial, strides[k], summed[k] = partial_of(own, sizes, strides[k], blocks)
        partials.append(partial)
    header = dict(
        zip(
            HEADER,
            (len(outer), rows, cols, row_block, col_block, row_blocks, col_blocks),
            strict=True,
        )
    )
    meta = [*header.values(), *(s[1] for s in strides), *(s[0] for s in strides)]
    for d, size in enumerate(outer, start=2):
        meta += [size, *(s[d] for s in strides)]
    letters = "".join(
        tiled_transpose.LETTER if k in across else summed.get(k) or {1: "u", 0: "z"}.get(s[0], "s")
        for k, s in enumerate(strides)
    )
    # A result of one element that is written over and over has no place in a row.
    letters = letters[:inputs] + letters[inputs:].replace("z", "s")
    return Layout(
        shape,
        out_strides,
        letters,
        tuple(meta),
        0 if 0 in shape else prod(outer) * row_blocks * col_blocks,
        row_block * col_block,
        tuple(partials),
    )


def _lies_across(sizes: list[int], strides: list[int]) -> bool:
    return strides[0] not in (0, 1) and any(
        stride == 1 and size >= 16 for size, stride in zip(sizes[1:], strides[1:], strict=True)
    )
