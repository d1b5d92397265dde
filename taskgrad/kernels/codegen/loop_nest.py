"""The loop nest of an elementwise kernel: broadcasting, the order of dimensions, blocks.

As in torch's TensorIterator, dimensions are ordered by the operands' strides, the first operand
first, and adjacent ones are coalesced where their memory is. A new result gets strides in that
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from taskgrad.kernels.codegen import tiled_transpose
from taskgrad.kernels.codegen.access import Access
from taskgrad.kernels.codegen.partial_sums import Partial, block_of, partial_of

Ints = tuple[int, ...]

_BLOCK = 8192  # elements, without transposed operands
_ACCESS = {1: Access.UNIT, 0: Access.SCALAR}  # by the stride; of others STRIDED
_SHORTEST_COLUMN = 16  # below that a transposed operand is read with its strides


@dataclass(frozen=True)
class LoopNest:
    """How a kernel iterates over its operands."""

    shape: Ints  # of the result
    out_strides: Ints
    accesses: tuple[Access, ...]  # of inputs and outputs
    meta: Ints  # what the kernel reads: `elementwise_source.HEADER`, strides, outer dimensions
    items: int  # blocks
    rows: int  # size of the second innermost dimension
    columns: int  # of the innermost one
    partials: tuple[Partial | None, ...]  # of each output that is summed


def broadcast(shapes: Sequence[Ints]) -> Ints:
    """The common shape; ValueError, which names the dimension, if there is none."""
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
    """Strides of a tensor expanded to the common shape: 0 where it is broadcast."""
    missing = len(shape) - len(own)
    return (0,) * missing + tuple(
        0 if size == 1 != whole else stride
        for size, stride, whole in zip(own, strides, shape[missing:], strict=True)
    )


def loop_nest(
    operands: Sequence[tuple[Ints, Ints]],
    out: tuple[Ints, Ints] | None,
    outputs: int,
    sums: Sequence[Ints | None] = (),
    tile_columns: int = tiled_transpose.COLUMNS,
) -> LoopNest:
    """The loop nest for inputs of these shapes and strides, which must broadcast together.

    `out` has those of an existing tensor for the result; `sums` for each output the shape to which
    it is summed, if it is. A block with transposed operands has `tile_columns` columns.
    """
    shape = broadcast([s for s, _ in operands])
    inputs = [aligned(shape, own, given) for own, given in operands]
    order = _order(shape, [*([out[1]] if out else []), *inputs])
    out_strides = out[1] if out else _dense(shape, order)
    sums = sums or [None] * outputs
    results = [out_strides if own is None else aligned(shape, own, contiguous(own)) for own in sums]
    sizes, strides = _coalesce(
        [shape[d] for d in order], [[s[d] for d in order] for s in (*inputs, *results)]
    )
    if not sizes or 0 in sizes:
        sizes, strides = [1], [[1] for _ in strides]
    transposed = _move_rows(sizes, strides, len(inputs))
    if len(sizes) == 1:
        sizes, strides = [*sizes, 1], [[*s, 0] for s in strides]
    cols, rows, *outer = sizes
    row_block, col_block = tiled_transpose.ROWS, tile_columns
    if not transposed:
        row_block, col_block = _block(cols, rows, sums, strides[len(inputs) :])
    row_blocks, col_blocks = -(-rows // row_block), -(-cols // col_block)
    accesses = [
        Access.TRANSPOSED if k in transposed else _ACCESS.get(s[0], Access.STRIDED)
        for k, s in enumerate(strides[: len(inputs)])
    ]
    partials: list[Partial | None] = []
    for k, own in enumerate(sums, start=len(inputs)):
        if own is None:
            # A result of one element that is written repeatedly is not scalar over a row.
            accesses.append(Access.UNIT if strides[k][0] == 1 else Access.STRIDED)
            partials.append(None)
        else:
            blocks = col_blocks, row_blocks
            partial, strides[k], access = partial_of(own, sizes, strides[k], blocks)
            accesses.append(access)
            partials.append(partial)
    meta = [len(outer), rows, cols, row_block, col_block, row_blocks, col_blocks]
    meta += [*(s[1] for s in strides), *(s[0] for s in strides)]
    for d, size in enumerate(outer, start=2):
        meta += [size, *(s[d] for s in strides)]
    return LoopNest(
        shape,
        out_strides,
        tuple(accesses),
        tuple(meta),
        0 if 0 in shape else prod(outer) * row_blocks * col_blocks,
        rows,
        cols,
        tuple(partials),
    )


def strides_of_result(operands: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Shape and strides of a new result."""
    shape = broadcast([s for s, _ in operands])
    strides = [aligned(shape, own, given) for own, given in operands]
    return shape, _dense(shape, _order(shape, strides))


def contiguous(shape: Ints) -> Ints:
    """The strides of a contiguous tensor."""
    return _dense(shape, list(reversed(range(len(shape)))))


def _order(shape: Ints, operands: Sequence[Ints]) -> list[int]:
    """Dimensions, innermost first: an insertion sort, since ambiguous pairs are not transitive."""
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


def _coalesce(sizes: list[int], rows: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Drop dimensions of size 1 and join adjacent ones that are one dimension for every operand."""
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


def _move_rows(sizes: list[int], strides: list[list[int]], inputs: int) -> list[int]:
    """Make the rows the dimension with stride 1 of the first transposed input; all such inputs."""
    transposed = [k for k in range(inputs) if _is_transposed(sizes, strides[k])]
    if not transposed:
        return []
    d = strides[transposed[0]].index(1)
    for values in (sizes, *strides):
        values.insert(1, values.pop(d))
    return [k for k in transposed if strides[k][1] == 1]


def _is_transposed(sizes: list[int], strides: list[int]) -> bool:
    return strides[0] not in (0, 1) and any(
        stride == 1 and size >= _SHORTEST_COLUMN
        for size, stride in zip(sizes[1:], strides[1:], strict=True)
    )


def _block(
    cols: int, rows: int, sums: Sequence[Ints | None], results: list[list[int]]
) -> tuple[int, int]:
    """Rows and columns of a block without transposed operands."""
    summed = [strides for own, strides in zip(sums, results, strict=True) if own is not None]
    if summed:
        return block_of(cols, rows, any(not strides[1] for strides in summed))
    col_block = min(cols, _BLOCK)
    return max(1, min(rows, _BLOCK // col_block)), col_block
