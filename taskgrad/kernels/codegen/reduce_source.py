"""The sources of the kernels that reduce and scan one dimension with a function of two arguments.

A reduction is a tree: neighbours are combined, then neighbours of the results, in the order of the
elements. So the function need be associative only, rounding errors grow with the logarithm of the
length, and the shape alone decides the bits. The dimension is cut into segments of a fixed length;
(row, segment) pairs are the items that threads share, and the segments' results are reduced again.

A function that also commutes may combine elements that are far apart, so that vector registers need
not be turned round: a dense row is then read as a table (`lanes_source`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from textwrap import indent

from taskgrad.kernels.codegen.elementwise_source import HEAD
from taskgrad.kernels.codegen.scalar_code import Body
from taskgrad.kernels.codegen.work_stealing import DONE, FAILED, ITEMS, ZERO_DIVISION, entry
from taskgrad.kernels.ir.dtypes import SIZES, Kind

HEADER = ("depth", "length", "stride", "segment", "segments", "cols", "col_stride", "col_blocks")
SEGMENT = 65_536  # along rows
COLUMN_SEGMENT = 512  # with columns side by side
BLOCK = 2_048  # elements whose tree fits into scratch memory
COLUMNS = 256
_BASE = 8  # rows of columns added up one after another
_LANES = 16  # columns of the table as which a dense row is read
_TREE = 16  # its rows that are combined in registers, and so many of their results again
# Bytes after what is read now that a row larger than the caches has fetched; 0 where it is not, as
# to ask costs a tenth of what it takes to read from there.
AHEAD = 4096
_LEVELS = 40
SCRATCH = max(2 * BLOCK * 8, (_LEVELS + 1) * COLUMNS * 8) + _LEVELS * 8
SCAN_SEGMENT = 256


def fold_source(body: Body, dtype: str, columns: bool, title: str) -> str:
    """A module whose ``kernel`` reduces each segment of one dimension.

    Parameters
    ----------
    body : Body
        Of the function, for two values of the dtype in which is computed.
    dtype : str
        Of the tensor; the results are in the dtype in which is computed.
    columns : bool
        Whether elements of different results lie side by side, rather than those of one.
    title : str
    """
    held = Kind(dtype).computed
    names = {"T": held, "X": dtype, "size": SIZES[dtype], "held": SIZES[held]}
    names |= {"half": BLOCK * 8, "block": BLOCK, "columns": COLUMNS, "base": _BASE}
    names |= {"row": COLUMNS * 8, "stack": SCRATCH - _LEVELS * 8}
    template = _SEGMENTS + (_COLUMNS if columns else _ROWS)
    return HEAD.format(title=title) + _made(template, ("x", "out"), names, body)


def lanes_source(body: Body, dtype: str, title: str) -> str:
    """As `fold_source` for neighbours in memory, with a function that commutes.

    Where there are several segments, whoever is the last to end joins what they gave, so that one
    call does it all, in memory that the threads share.
    """
    held = Kind(dtype).computed
    names = {"T": held, "X": dtype, "size": SIZES[dtype], "held": SIZES[held]}
    names |= {"columns": COLUMNS, "row": COLUMNS * 8, "stack": SCRATCH - _LEVELS * 8}
    names |= {"levels": _LEVELS, "lanes": _LANES, "group": _TREE * _LANES, "groups": _TREE}
    names |= {"chunk": _TREE * _TREE * _LANES}
    names |= {"chain": _chain(f"m.load_{dtype}(p, i + <k>)")}
    names |= {"tree": _tree(f"m.get_{held}(groups, i + <k>)")}
    names |= {"done": DONE}
    template = _SEGMENTS + _ROWS_AS_TABLE
    addresses = ("x", "out", "between")
    return HEAD.format(title=title) + _made(template, addresses, names, body)


def _rows(element: str) -> list[str]:
    """What is at column ``i`` of each row of a table; ``<k>`` is where a row begins."""
    return [element.replace("<k>", str(k * _LANES)) for k in range(_TREE)]


def _chain(element: str) -> str:
    """Rows combined one after another, as they come out of memory."""
    return functools.reduce(lambda a, b: f"combine({a}, {b})", _rows(element))


def _tree(element: str) -> str:
    """Rows combined in pairs, and these in pairs."""
    values = _rows(element)
    while len(values) > 1:
        values = [f"combine({a}, {b})" for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def scan_source(body: Body, dtype: str, title: str) -> str:
    """A module whose ``kernel`` writes the running results of each segment of a dense row."""
    held = Kind(dtype).computed
    names = {"T": held, "X": dtype, "size": SIZES[dtype], "held": SIZES[held]}
    return HEAD.format(title=title) + _made(_SCAN, ("x", "before", "out"), names, body)


def recurrence_source(dtype: str, title: str) -> str:
    """A module whose ``kernel`` computes h[i] = g[i] + a[i] h[i - 1] along each dense row."""
    names = {"T": dtype, "size": SIZES[dtype]}
    return HEAD.format(title=title) + _filled(_RECURRENCE, ("a", "g", "out"), names)


def _made(template: str, addresses: Sequence[str], names: Mapping[str, object], body: Body) -> str:
    """A template with the function that it combines two values with."""
    held = str(names["T"])
    before, divides = body.zero_division()
    lines = body.lines()
    if divides:
        lines += [*before, f"if {divides}:"]
        lines += [f"    m.store_int64(call, {FAILED}, {ZERO_DIVISION})"]
    combine = (
        "@njit(forceinline=True, error_model='numpy')\n"
        "def combine(a0, a1):\n"
        + "".join(f"    {line}\n" for line in lines)
        + f"    return {body.result(0, held)}\n\n\n"
    )
    source = combine + _filled(template, addresses, names)
    return source.replace("combine(", "combine(call, ") if divides else source


def _filled(template: str, addresses: Sequence[str], names: Mapping[str, object]) -> str:
    names = {"entry": "\n".join(entry(addresses)), "items": "\n".join(ITEMS), **names}
    names = {"join": _JOIN.rstrip(), "collect": _COLLECT.rstrip(), **names}
    names = {"collect_here": indent(_COLLECT.rstrip(), 4 * " "), **names}
    names = {"halved": _HALVED.rstrip(), **names}
    names = {"halved_there": indent(_HALVED.rstrip(), 4 * " "), **names}
    for name, value in names.items():
        template = template.replace(f"<{name}>", str(value))
    return template


_SEGMENTS = """\
<entry>
    depth = m.load_int64(meta, 0)
    length = m.load_int64(meta, 1)
    stride = m.load_int64(meta, 2)
    segment = m.load_int64(meta, 3)
    segments = m.load_int64(meta, 4)
    cols = m.load_int64(meta, 5)
    col_stride = m.load_int64(meta, 6)
    col_blocks = m.load_int64(meta, 7)
    stack = scratch + <stack>
    mine = 0
<items>
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
            # Blocks are joined as a binary number counts: two of a size make one of the next.
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
            # Blocks are joined as a binary number counts: two of a size make one of the next.
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

_HALVED = """\
        while left > 1:
            half = left // 2
            for j in range(half):
                upper = m.get_<T>(here, left - half + j)
                m.put_<T>(here, j, combine(m.get_<T>(here, j), upper))
            left -= half
"""

_ROWS_AS_TABLE = """\
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
                        m.ahead_read(p + ahead + i)
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
<collect_here>
        # Less than a chunk is left: its groups, and then its rows, come on top of that.
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
<halved>
        m.put_<T>(o, 0, m.get_<T>(here, 0))
        mine += 1
    if segments > 1 and mine > 0 and m.take(call, <done>, mine) + mine == items:
        for row in range(items // segments):
            here, left = between + row * segments * <held>, segments
<halved_there>
            m.put_<T>(out, row, m.get_<T>(here, 0))
"""

_SCAN = """\
<entry>
    length = m.load_int64(meta, 1)
    segment = m.load_int64(meta, 3)
    segments = m.load_int64(meta, 4)
<items>
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
<entry>
    length = m.load_int64(meta, 1)
<items>
        first = item * length
        h = m.load_<T>(g, first)
        m.store_<T>(out, first, h)
        for i in range(first + 1, first + length):
            h = m.load_<T>(g, i) + m.load_<T>(a, i) * h
            m.store_<T>(out, i, h)
"""
