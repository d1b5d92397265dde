"""Operands that lie across: the same bits as torch, whatever the tile; the next one's lines."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels import turned

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
    assert fn.explain().kernels[-1].along.count(turned.LETTER) == 2


def _lines_of_tiles(rows, columns, size):
    """What a kernel of an operand across, one that lies straight and a result touches and asks for.

    The lines that `Tiles` writes run here as Python.
    """
    tiles = turned.Tiles("tuu", ["float32" if size == 4 else "float64"] * 3, 2)
    lines = ["def tile(m, cb, col_blocks, col_block, row_block, r0, r1, c0, n, scratch, places):"]
    for k in range(3):
        lines.append(f"    start{k}, rs{k}, cs{k} = places[{k}]")
        lines.append(f"    q{k} = start{k} + (r0 * rs{k} + c0 * cs{k}) * {size}")
    lines += [line[4:] for line in tiles.block()]
    lines.append("    for r in range(r1 - r0):")
    lines += [f"        o{k} = q{k} + r * rs{k} * {size}" for k in range(3)]
    lines += [line[4:] for line in tiles.row()]
    scope: dict = {}
    exec("\n".join(lines), scope)

    places = [(0, 1, rows), (1 << 20, columns, 1), (1 << 21, columns, 1)]
    found = []
    for r0 in range(0, rows, turned.ROWS):
        for cb, c0 in enumerate(range(0, columns, turned.COLUMNS)):
            r1, n = min(rows, r0 + turned.ROWS), min(turned.COLUMNS, columns - c0)
            asked: set = set()

            def across(at, stride, asked=asked):
                asked.update((at + k * stride) // 64 for k in range(turned.STRIP))

            m = SimpleNamespace(
                ahead_read=lambda at, asked=asked: asked.add(at // 64),
                ahead_write=lambda at, asked=asked: asked.add(at // 64),
                ahead_across=across,
            )
            for name in ("float32", "float64"):
                setattr(m, f"turn_{name}", lambda *_: None)
                setattr(m, f"load_{name}", lambda *_: 0)
                setattr(m, f"put_{name}", lambda *_: None)
            blocks = -(-columns // turned.COLUMNS)
            tile = (cb, blocks, turned.COLUMNS, turned.ROWS, r0, r1, c0, n)
            scope["tile"](m, *tile, 0, places)
            touched = {
                (start + (r * rs + c * cs) * size) // 64
                for start, rs, cs in places
                for r in range(r0, r1)
                for c in range(c0, c0 + n)
            }
            found.append((touched, asked))
    return found


@pytest.mark.parametrize("size", [4, 8])
def test_a_tile_asks_for_the_lines_of_the_next(size):
    found = _lines_of_tiles(2 * turned.ROWS, 3 * turned.COLUMNS, size)
    assert len(found) == 6
    for (_, asked), (touched, _) in pairwise(found):
        assert asked == touched
