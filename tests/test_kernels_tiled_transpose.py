"""Tiled transposition: the same bits as torch for every tile; the next tile is prefetched."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels.codegen import nontemporal, tiled_transpose
from taskgrad.kernels.codegen.access import CACHE_LINE, Access

minus_twice = tg.vectorize(lambda x, y: x - y * 2)
SHAPES = [(1, 7), (7, 9), (8, 8), (64, 128), (65, 129), (127, 300), (513, 70), (3, 66, 131)]
DTYPES = [torch.int8, torch.int64, torch.bfloat16, torch.float32, torch.float64]


def _numbers(shape, dtype):
    return torch.randint(-40, 40, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype(shape, dtype):
    *outer, rows, columns = shape
    x, y = _numbers(shape, dtype), _numbers((*outer, columns, rows), dtype).transpose(-1, -2)
    for a, b in ((x, y), (y, x)):
        expected = a - b * 2
        assert torch.equal(minus_twice(a, b), expected)
        out = a.clone(memory_format=torch.preserve_format)
        assert torch.equal(minus_twice(out, b, out=out), expected)


def test_two_operands_across_the_result():
    fn = tg.vectorize(lambda x, y, z: x * y - z)
    across = [torch.randn(200, 301).t() for _ in range(2)]
    x, out = torch.randn(301, 200), torch.empty(301, 200)
    expected = across[0] * across[1] - x
    torch.testing.assert_close(fn(*across, x, out=out), expected)
    assert fn.explain().kernels[-1].along.count("t") == 2


def test_results_with_nontemporal_stores(monkeypatch):
    """Tiles begin and end with the lines of each row of the result, wherever those lie."""
    monkeypatch.setattr(nontemporal, "last_level_cache", lambda: 0)
    fn = tg.vectorize(lambda x, y: x - y * 2)
    shapes = [(7, 256), (64, 512), (65, 513), (70, 777), (3, 66, 1_031), (33, 2_049)]
    for dtype in DTYPES:
        for *outer, rows, columns in shapes:
            x = _numbers((*outer, rows, columns), dtype)
            y = _numbers((*outer, columns, rows), dtype).transpose(-1, -2)
            held = torch.full((x.numel() + 80,), 99, dtype=dtype)
            for offset in (0, 1, 5, 15, 63):
                out = held[offset : offset + x.numel()].view(x.shape)
                assert torch.equal(fn(x, y, out=out), x - y * 2)
                out.fill_(99)
                assert held.eq(99).all()  # nothing was written beside it
    made = [plan.loops for plan in fn._operation.launcher.plans.values()]
    assert {"".join(one.accesses) for one in made} == {"utp", "usp"}  # 7 rows are too few for tiles
    wide = 64 * tiled_transpose.NONTEMPORAL_COLUMNS
    blocks = [one.meta[3:5] for one in made if "t" in one.accesses]
    assert {rows * columns for rows, columns in blocks} == {wide}


def test_results_at_odd_addresses_and_of_another_size(monkeypatch):
    monkeypatch.setattr(nontemporal, "last_level_cache", lambda: 0)
    fn = tg.vectorize(lambda x, y: x * y)
    x, y = torch.randn(100, 600), torch.randn(600, 100).t()
    out = torch.frombuffer(bytearray(4 * 60_000 + 64), dtype=torch.float32, count=60_000, offset=3)
    assert torch.equal(fn(x, y, out=out.view(100, 600)), x * y)
    less = tg.vectorize(lambda x, y: x < y)
    assert torch.equal(less(x, y), x < y)  # 63 more columns, as a line has 64 results
    doubles = y.to(torch.float64)
    assert torch.equal(less(x.to(torch.float64), doubles), x < y)
    assert torch.equal(fn(x.to(torch.bfloat16), doubles), x.to(torch.bfloat16) * doubles)
    letters = {kernel.along for f in (fn, less) for kernel in f.explain().kernels}
    assert letters == {"utp"}


def test_gradients_that_are_summed_in_tiles_stay_in_the_caches(monkeypatch):
    monkeypatch.setattr(nontemporal, "last_level_cache", lambda: 0)
    fn = tg.vectorize(lambda x, y, b: x * y * b)
    x, b = (torch.randn(size, requires_grad=True) for size in ((300, 700), (700,)))
    y = torch.randn(700, 300).t()
    ours = torch.autograd.grad(fn(x, y, b).sum(), (x, b))
    theirs = torch.autograd.grad((x * y * b).sum(), (x, b))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    (letters,) = (k.along for k in fn.explain().kernels if k.part == "pullback(0,2)")
    assert {"t", "r"} < set(letters) <= set("utrz")


def _cache_lines(rows, columns, size, past, apart=None):
    """The cache lines that each tile touches and prefetches, as sets.

    A transposed operand, one with unit stride and a result; the code that `TransposeCode` generates
    runs here as Python. If the result is `past` the caches, each tile's rows end half a line later
    than its columns. The transposed operand's columns are `apart` elements from each other.
    """
    beyond = CACHE_LINE // size if past else 0
    name = "float32" if size == 4 else "float64"
    accesses = [Access(letter) for letter in ("tup" if past else "tuu")]
    tiles = tiled_transpose.TransposeCode(accesses, [name] * 3, 2, beyond)
    names = "m, cb, col_blocks, col_block, row_block, r0, r1, c0, n, cols, scratch, places"
    lines = [f"def tile({names}):"]
    for k in range(3):
        lines.append(f"    start{k}, rs{k}, cs{k} = places[{k}]")
        lines.append(f"    q{k} = start{k} + (r0 * rs{k} + c0 * cs{k}) * {size}")
    lines += [line[4:] for line in tiles.before_block()]
    lines.append("    for r in range(r1 - r0):")
    lines += [f"        o{k} = q{k} + r * rs{k} * {size}" for k in range(3)]
    lines += [line[4:] for line in tiles.before_row()]
    scope: dict = {}
    exec("\n".join(lines), scope)

    places = [(0, 1, apart or rows), (1 << 20, columns, 1), (1 << 21, columns, 1)]
    found = []
    for r0 in range(0, rows, tiled_transpose.ROWS):
        for cb, c0 in enumerate(range(0, columns, tiled_transpose.COLUMNS)):
            r1, n = min(rows, r0 + tiled_transpose.ROWS), min(tiled_transpose.COLUMNS, columns - c0)
            fetched: set = set()

            def column(at, fetched=fetched):
                fetched.update(at // 64 + k for k in range(tiled_transpose.ROWS * size // 64))

            m = SimpleNamespace(
                prefetch_read=lambda at, fetched=fetched: fetched.add(at // 64),
                prefetch_write=lambda at, fetched=fetched: fetched.add(at // 64),
            )
            setattr(m, f"prefetch_column_{name}", column)
            setattr(m, f"transpose_{name}", lambda *_: None)
            setattr(m, f"load_{name}", lambda *_: 0)
            setattr(m, f"put_{name}", lambda *_: None)
            blocks = -(-columns // tiled_transpose.COLUMNS)
            tile = cb, blocks, tiled_transpose.COLUMNS, tiled_transpose.ROWS, r0, r1, c0, n, columns
            scope["tile"](m, *tile, 0, places)
            half = beyond // 2
            begin, end = c0 + half * (cb > 0), c0 + n + half * (cb + 1 < blocks)
            touched = {
                (start + (r * rs + c * cs) * size) // 64
                for start, rs, cs in places[: 2 if past else 3]
                for r in range(r0, r1)
                for c in range(begin, end)
            }
            found.append((touched, fetched))
    return found


@pytest.mark.parametrize("size", [4, 8])
def test_a_tile_prefetches_the_lines_of_the_next(size):
    found = _cache_lines(2 * tiled_transpose.ROWS, 3 * tiled_transpose.COLUMNS, size, past=False)
    assert len(found) == 6
    for (_, fetched), (touched, _) in pairwise(found):
        assert fetched == touched


@pytest.mark.parametrize("size", [4, 8])
def test_and_those_of_rows_that_extend_beyond_it(size):
    found = _cache_lines(tiled_transpose.ROWS, 4 * tiled_transpose.COLUMNS, size, past=True)
    assert len(found) == 4
    for first, second, third in zip(found, found[1:], found[2:], strict=False):
        there = first[1] | second[0] | second[1]
        touched = third[0]
        assert touched <= there
        assert len(second[1] - touched) <= 3 * tiled_transpose.ROWS  # a line a row, 8 or 16 columns


def test_a_tile_of_few_rows_prefetches_all_columns():
    found = _cache_lines(24, 2 * tiled_transpose.COLUMNS, 4, past=False, apart=320)
    (_, fetched), (touched, _) = found
    assert touched <= fetched
