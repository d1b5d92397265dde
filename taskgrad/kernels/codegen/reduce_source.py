"""Sources of the kernels that reduce or scan one dimension with a function of two arguments.

A reduction is a tree: adjacent elements are combined, then adjacent results, in the order of the
elements. So the function need only be associative, rounding errors grow with the logarithm of the
length, and the shape alone determines the bits. The dimension is divided into segments of a fixed
length; the items that threads share are (row, segment) pairs, and the segments' results are reduced
again.

A commutative function may combine elements that are far apart, so that vector registers need no
shuffles: `lanes_source` reads a dense row as a table with a column for each vector lane.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from textwrap import indent

from taskgrad.kernels.codegen.elementwise_source import HEAD
from taskgrad.kernels.codegen.scalar_code import ScalarCode
from taskgrad.kernels.codegen.work_stealing import DONE, FAILED, ITEM_LOOP, ZERO_DIVISION, prologue
from taskgrad.kernels.ir.dtypes import SIZES, ValueType

SEGMENT = 65_536  # elements of a row
COLUMN_SEGMENT = 512  # elements of a column, if columns are adjacent in memory
SCAN_SEGMENT = 256
BLOCK = 2_048  # elements whose tree fits into scratch memory
COLUMNS = 256
# Bytes by which a row larger than the caches is prefetched ahead. Smaller ones are not prefetched:
# that costs a tenth of the time.
PREFETCH_DISTANCE = 4096
_BASE = 8  # rows of adjacent columns that are combined sequentially
_LANES = 16  # columns of the table as which a dense row is read
_TREE = 16  # rows of the table that are combined in registers, and as many of their results again
_LEVELS = 40
_STACK = max(2 * BLOCK * 8, (_LEVELS + 1) * COLUMNS * 8)  # offset in scratch memory
SCRATCH = _STACK + _LEVELS * 8


def reduce_source(code: ScalarCode, dtype: str, columns: bool, title: str) -> str:
    """A module whose ``kernel`` reduces each segment of one dimension of a tensor of this dtype.

    `code` combines two values of its computed dtype, in which results are stored. `columns` is True
    if adjacent elements belong to different results.
    """
    names = {"half": BLOCK * 8, "block": BLOCK, "columns": COLUMNS, "base": _BASE}
    names |= {"row": COLUMNS * 8, "stack": _STACK}
    template = _SEGMENTS + (_COLUMNS if columns else _ROWS)
    return _source(template, ("x", "out"), dtype, code, title, names)


def lanes_source(code: ScalarCode, dtype: str, title: str) -> str:
    """As `reduce_source`, for contiguous rows and commutative functions.

    With several segments, the thread that completes the last item combines their results, from
    memory that the threads share, so one call does everything.
    """
    held = ValueType(dtype).computed
    names: dict[str, object] = {"columns": COLUMNS, "row": COLUMNS * 8, "stack": _STACK}
    names |= {"levels": _LEVELS, "lanes": _LANES, "group": _TREE * _LANES, "groups": _TREE}
    names |= {"chunk": _TREE * _TREE * _LANES, "done": DONE}
    names |= {"chain": _chain(f"m.load_{dtype}(p, i + <k>)")}
    names |= {"tree": _tree(f"m.get_{held}(groups, i + <k>)")}
    return _source(_SEGMENTS + _TABLE, ("x", "out", "between"), dtype, code, title, names)


def _table_rows(element: str) -> list[str]:
    """The text for column ``i`` of each row of a table; ``<k>`` is where the row begins."""
    return [element.replace("<k>", str(k * _LANES)) for k in range(_TREE)]


def _chain(element: str) -> str:
    """Rows combined sequentially, as they arrive from memory."""
    return functools.reduce(lambda a, b: f"combine({a}, {b})", _table_rows(element))


def _tree(element: str) -> str:
    """Rows combined pairwise."""
    values = _table_rows(element)
    while len(values) > 1:
        values = [f"combine({a}, {b})" for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def scan_source(code: ScalarCode, dtype: str, title: str) -> str:
    """A module whose ``kernel`` writes the running results of each segment of a dense row."""
    return _source(_SCAN, ("x", "before", "out"), dtype, code, title, {})


def recurrence_source(dtype: str, title: str) -> str:
    """A module whose ``kernel`` computes h[i] = g[i] + a[i] h[i - 1] along each dense row."""
    return _source(_RECURRENCE, ("a", "g", "out"), dtype, None, title, {})


def _source(
    template: str,
    operands: Sequence[str],
    dtype: str,
    code: ScalarCode | None,
    title: str,
    names: Mapping[str, object],
) -> str:
    """Fill in a template, and define the function ``combine`` that it calls."""
    held = ValueType(dtype).computed
    blocks = {"join": _JOIN, "collect": _COLLECT, "halve": _HALVE}
    fields = {
        "prologue": "\n".join(prologue(operands)),
        "item_loop": "\n".join(ITEM_LOOP),
        **{name: text.rstrip() for name, text in blocks.items()},
        **{f"indented {name}": indent(text.rstrip(), "    ") for name, text in blocks.items()},
        **{"T": held, "X": dtype, "size": SIZES[dtype], "held": SIZES[held]},
        **names,
    }
    for name, value in fields.items():
        template = template.replace(f"<{name}>", str(value))
    combine = ""
    if code is not None:
        before, divides = code.zero_division()
        lines = code.lines()
        if divides:
            template = template.replace("combine(", "combine(call, ")
            lines += [*before, f"if {divides}:"]
            lines += [f"    m.store_int64(call, {FAILED}, {ZERO_DIVISION})"]
        body = [*lines, f"return {code.result(0, held)}"]
        combine = (
            "@njit(forceinline=True, error_model='numpy')\n"
            f"def combine({'call, ' if divides else ''}a0, a1):\n"
            + "".join(f"    {line}\n" for line in body)
            + "\n\n"
        )
    return HEAD.format(title=title) + combine + template


_SEGMENTS = """\
<prologue>
    depth = m.load_int64(meta, 0)
    length = m.load_int64(meta, 1)
    stride = m.load_int64(meta, 2)
    segment = m.load_int64(meta, 3)
    segments = m.load_int64(meta, 4)
    cols = m.load_int64(meta, 5)
    col_stride = m.load_int64(meta, 6)
    col_blocks = m.load_int64(meta, 7)
    stack = scratch + <stack>
    completed = 0
<item_loop>
        rest = item // col_blocks
        c0 = (item - rest * col_blocks) * <columns>
        row = rest // segments
        first = (rest - row * segments) * segment
        n = min(segment, length - first)
        q = x + (first * stride + c0 * col_stride) * <size>
        o = out + (rest * cols + c0) * <held>
        for d in range(depth):
            size = m.load_int64(meta, 8 + 2 * d)
            q += row % size * m.load_int64(meta, 9 + 2 * d) * <size>
            row = row // size
"""

_ROWS = """\
        done = 0
        for b0 in range(0, n, <block>):
            left = min(<block>, n - b0)
            p = q + b0 * stride * <size>
            here, there = scratch, scratch + <half>
            fours = left // 4
            if stride == 1:
                for i in range(2 * fours):
                    v = combine(m.get_<X>(p, 2 * i), m.get_<X>(p, 2 * i + 1))
                    m.put_<T>(there, i, v)
                for i in range(fours):
                    v = combine(m.get_<T>(there, 2 * i), m.get_<T>(there, 2 * i + 1))
                    m.put_<T>(here, i, v)
            else:
                for i in range(fours):
                    j = 4 * i * stride
                    v = combine(m.get_<X>(p, j), m.get_<X>(p, j + stride))
                    j += 2 * stride
                    w = combine(m.get_<X>(p, j), m.get_<X>(p, j + stride))
                    m.put_<T>(here, i, combine(v, w))
            if left % 4:
                v = m.get_<X>(p, 4 * fours * stride)
                for i in range(4 * fours + 1, left):
                    v = combine(v, m.get_<X>(p, i * stride))
                m.put_<T>(here, fours, v)
                fours += 1
            left = fours
            while left > 1:
                half = left // 2
                for i in range(half):
                    v = combine(m.get_<T>(here, 2 * i), m.get_<T>(here, 2 * i + 1))
                    m.put_<T>(there, i, v)
                if left % 2:
                    m.put_<T>(there, half, m.get_<T>(here, left - 1))
                left = half + left % 2
                here, there = there, here
            v = m.get_<T>(here, 0)
            # A binary counter of subtrees: two of one size are combined to one of the next.
            level, k = 0, done
            while k % 2:
                v = combine(m.get_<T>(stack, level), v)
                k //= 2
                level += 1
            m.put_<T>(stack, level, v)
            done += 1
        level, k = 0, done
        while k % 2 == 0:
            k //= 2
            level += 1
        v = m.get_<T>(stack, level)
        while k > 1:
            k //= 2
            level += 1
            if k % 2:
                v = combine(m.get_<T>(stack, level), v)
        m.put_<T>(o, 0, v)
"""

_JOIN = """\
            # A binary counter of subtrees: two of one size are combined to one of the next.
            level, k = 1, done
            while k % 2:
                other = scratch + level * <row>
                for j in range(w):
                    m.put_<T>(here, j, combine(m.get_<T>(other, j), m.get_<T>(here, j)))
                k //= 2
                level += 1
            other = scratch + level * <row>
            for j in range(w):
                m.put_<T>(other, j, m.get_<T>(here, j))
            done += 1
"""

_COLLECT = """\
        level, k = 1, done
        while k % 2 == 0:
            k //= 2
            level += 1
        here = scratch + level * <row>
        while k > 1:
            k //= 2
            level += 1
            if k % 2:
                other = scratch + level * <row>
                for j in range(w):
                    m.put_<T>(here, j, combine(m.get_<T>(other, j), m.get_<T>(here, j)))
"""

_COLUMNS = """\
        w = min(<columns>, cols - c0)
        done = 0
        for b0 in range(0, n, <base>):
            here = scratch
            p = q + b0 * stride * <size>
            for j in range(w):
                m.put_<T>(here, j, m.get_<X>(p, j * col_stride))
            for i in range(1, min(<base>, n - b0)):
                p += stride * <size>
                if col_stride == 1:
                    for j in range(w):
                        m.put_<T>(here, j, combine(m.get_<T>(here, j), m.get_<X>(p, j)))
                else:
                    for j in range(w):
                        v = m.get_<X>(p, j * col_stride)
                        m.put_<T>(here, j, combine(m.get_<T>(here, j), v))
<join>
<collect>
        for j in range(w):
            m.put_<T>(o, j, m.get_<T>(here, j))
"""

_HALVE = """\
        while left > 1:
            half = left // 2
            for j in range(half):
                upper = m.get_<T>(here, left - half + j)
                m.put_<T>(here, j, combine(m.get_<T>(here, j), upper))
            left -= half
"""

_TABLE = """\
        done, b0, w = 0, 0, min(<lanes>, n)
        if segments > 1:
            o = between + item * <held>
        groups = scratch + <row> * <levels>
        ahead = m.load_int64(meta, 8 + 2 * depth)
        while b0 + <chunk> <= n:
            for g in range(<groups>):
                p, here = q + b0 * <size>, groups + g * <lanes> * <held>
                if ahead > 0:
                    for i in range(0, <group> * <size>, 64):
                        m.prefetch_read(p + ahead + i)
                for i in range(<lanes>):
                    m.store_<T>(here, i, <chain>)
                b0 += <group>
            here = scratch
            for i in range(<lanes>):
                m.put_<T>(here, i, <tree>)
<join>
        some = done > 0
        here = scratch + <row>
        if some:
<indented collect>
        # The rest, less than a chunk: first its groups, then its rows.
        while b0 + <group> <= n:
            p = q + b0 * <size>
            for i in range(<lanes>):
                m.store_<T>(scratch, i, <chain>)
            for i in range(<lanes>):
                v = m.get_<T>(scratch, i)
                m.put_<T>(here, i, combine(m.get_<T>(here, i), v) if some else v)
            b0, some = b0 + <group>, True
        while b0 < n:
            p = q + b0 * <size>
            for i in range(min(<lanes>, n - b0)):
                v = m.get_<X>(p, i)
                m.put_<T>(here, i, combine(m.get_<T>(here, i), v) if some else v)
            b0, some = b0 + <lanes>, True
        left = w
<halve>
        m.put_<T>(o, 0, m.get_<T>(here, 0))
        completed += 1
    if segments > 1 and completed > 0 and m.fetch_add(call, <done>, completed) + completed == items:
        for row in range(items // segments):
            here, left = between + row * segments * <held>, segments
<indented halve>
            m.put_<T>(out, row, m.get_<T>(here, 0))
"""

_SCAN = """\
<prologue>
    length = m.load_int64(meta, 1)
    segment = m.load_int64(meta, 3)
    segments = m.load_int64(meta, 4)
<item_loop>
        row = item // segments
        number = item - row * segments
        first = row * length + number * segment
        n = min(segment, length - number * segment)
        v = m.get_<X>(x, first)
        if number > 0:
            v = combine(m.get_<T>(before, row * segments + number - 1), v)
        m.put_<X>(out, first, v)
        for i in range(1, n):
            v = combine(v, m.load_<X>(x, first + i))
            m.store_<X>(out, first + i, v)
"""

_RECURRENCE = """\
<prologue>
    length = m.load_int64(meta, 1)
<item_loop>
        first = item * length
        h = m.load_<T>(g, first)
        m.store_<T>(out, first, h)
        for i in range(first + 1, first + length):
            h = m.load_<T>(g, i) + m.load_<T>(a, i) * h
            m.store_<T>(out, i, h)
"""
