"""The arithmetic of kernels is torch's: each row of the table in docs/kernels.md, each dtype."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import taskgrad as tg
from taskgrad.kernels.codegen import nontemporal

DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
TABLE = DOCS.read_text().partition("## Arithmetic")[2]
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", TABLE, re.MULTILINE)
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = math.nan, math.inf
NAMES = {"math": math, "torch": torch}
DIVISIONS = ("a // b", "a % b", "math.fmod(a, b)")
# What is computed by another algorithm is as close as it is promised to be.
CLOSE = ("a ** b", "math.atan2(a, b)", "math.log(a)", "math.sqrt(a)")
# torch's own vectors and last elements differ in the sign of the zero that they take.
EITHER_ZERO = ("max(a, b)", "min(a, b)")


def test_the_table_is_found():
    assert len(ROWS) > 25


def values(dtype):
    if dtype == torch.bool:
        return torch.tensor([True, False])
    if dtype.is_floating_point:
        numbers = [0.0, -0.0, 1, -1, 2, -3, 0.5, 2.5, 3.5, -2.5, 7, -7, 0.1, 1e4, INF, -INF, NAN]
        return torch.tensor(numbers, dtype=dtype)
    info = torch.iinfo(dtype)
    numbers = [0, 1, -1, 2, 3, -3, 7, -7, 8, 16, 31, 32, 63, 64, 100, info.max, info.min]
    return torch.tensor([n for n in numbers if info.min <= n <= info.max], dtype=dtype)


def pairs(dtype):
    x = values(dtype)
    return x.repeat_interleave(len(x)), x.repeat(len(x))


def assert_same(found, expected, row):
    assert found.dtype == expected.dtype, row
    if not expected.is_floating_point():
        assert torch.equal(found, expected), row
        return
    # torch rounds a quotient of float16 several times, kernels once.
    exact = row not in CLOSE and (row, expected.dtype) != ("a // b", torch.float16)
    rtol, atol = (0, 0) if exact else (None, None)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=row)
    if row not in EITHER_ZERO:
        number = ~expected.isnan()
        assert torch.equal(found.signbit() & number, expected.signbit() & number), row


def of_torch(row, a, b):
    """What torch gives for a row and for which operands, or None where it raises."""
    if row[0] in DIVISIONS and not a.is_floating_point():
        a, b = a[b != 0], b[b != 0]
    try:
        return eval(row[1], {**NAMES, "a": a, "b": b}), a, b
    except (RuntimeError, TypeError):
        return None


def chosen(rows):
    """One function of all rows, which its first argument chooses from."""
    lines = "".join(f"    if k == {i}:\n        return {row}\n" for i, (row, _) in enumerate(rows))
    names = dict(NAMES)
    exec(f"def chosen(k, a, b):\n{lines}    return {rows[0][0]}\n", names)
    return tg.vectorize(names["chosen"])


@pytest.fixture(scope="module")
def tables():
    """For a dtype: rows of one result's dtype, with the function of all of them."""
    made = {}

    def of(dtype):
        if dtype not in made:
            groups = {}
            for row in ROWS:
                known = of_torch(row, *pairs(dtype))
                if known is not None:
                    groups.setdefault(known[0].dtype, []).append(row)
            made[dtype] = [(rows, chosen(rows)) for rows in groups.values()]
        return made[dtype]

    return of


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_each_row_is_torchs(dtype, tables):
    refused = [row for row in ROWS if of_torch(row, *pairs(dtype)) is None]
    for row, _ in refused:
        with pytest.raises(TypeError, match="does not take bool|takes whole numbers"):
            tg.vectorize(eval(f"lambda a, b: {row}", NAMES))(*pairs(dtype))
    for rows, fn in tables(dtype):
        for i, row in enumerate(rows):
            expected, a, b = of_torch(row, *pairs(dtype))
            assert_same(fn(torch.tensor(i), a, b), expected, row[0])
    assert len(refused) < len(ROWS) / 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_vectors_and_the_elements_left_are_alike(dtype, tables):
    a, b = (x.repeat(2) for x in pairs(dtype))
    for rows, fn in tables(dtype):
        for i, row in enumerate(rows):
            whole, a, b = of_torch(row, *pairs(dtype))
            k = torch.tensor(i)
            whole = fn(k, a, b)
            for n in (1, 2, 3, 7, 8, 15, 17, 31, 33, 40):
                found = fn(k, a[-n:].clone(), b[-n:].clone())
                assert_same(found, whole[-n:], row[0])
            assert_same(fn(k, a[::3], b[::3]), whole[::3], row[0])
            assert_same(fn(k, a[:40].view(8, 5).t(), b[:40].view(8, 5).t()).t().flatten(),
                        whole[:40], row[0])  # fmt: skip


def test_past_the_caches_and_in_threads(monkeypatch, tables):
    monkeypatch.setattr(nontemporal, "last_level_cache", lambda: 1 << 16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype in (torch.int64, torch.float64):
            rows, fn = tables(dtype)[0]
            for name in ("a // b", "max(a, b)"):
                row = next(r for r in rows if r[0] == name)
                expected, a, b = of_torch(row, *pairs(dtype))
                times = 70_000 // len(a)
                found = fn(torch.tensor(rows.index(row)), a.repeat(times), b.repeat(times))
                assert_same(found, expected.repeat(times), name)
    finally:
        torch.set_num_threads(before)


def on_a_worker(fn, *args):
    return tg.collect(tg.spawn(fn, *args))


def test_on_a_worker(client, tables):
    for dtype in (torch.int64, torch.float32):
        for rows, fn in tables(dtype):
            for name in ("a // b", "a % b", "max(a, b)", "a << b", "a / b"):
                for i, row in enumerate(rows):
                    if row[0] == name:
                        expected, a, b = of_torch(row, *pairs(dtype))
                        assert_same(on_a_worker(fn, torch.tensor(i), a, b), expected, name)
    quotient = tg.vectorize(lambda a, b: a // b)
    with pytest.raises(Exception, match="ZeroDivisionError: an integer is divided by 0"):
        on_a_worker(quotient, torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


halving = tg.vectorize(lambda a, b: a // b if b != 0 else a)


def test_an_integer_divided_by_zero_is_an_error_where_it_is_used():
    a, b = torch.tensor([7, -7, 8]), torch.tensor([2, 0, 3])
    assert halving(a, b).tolist() == [3, -7, 2]
    for fn in (lambda a, b: a // b, lambda a, b: 1 + a % b, lambda a, b: max(divmod(a, b))):
        made = tg.vectorize(fn)
        with pytest.raises(RuntimeError, match=r"ZeroDivisionError: .* in <lambda>"):
            made(a, b)
        assert made(a[:1], b[:1]).shape == (1,)
        assert made(a[:0], b[:0]).shape == (0,)
    rest = tg.vectorize(lambda a, b: a % b)
    for way in (rest.reduce, rest.scan):
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            way(torch.tensor([7, 0, 3]))
    assert rest.scan(torch.tensor([7, 5, 3])).tolist() == [7, 2, 2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_reductions_and_scans(dtype):
    x = values(dtype).repeat(30)
    largest, least = tg.vectorize(lambda a, b: max(a, b)), tg.vectorize(lambda a, b: min(a, b))
    for row in (x, x.flip(0), x[:13], x[~x.isnan()]):
        for fn, whole, running in (
            (largest, torch.amax, torch.cummax),
            (least, torch.amin, torch.cummin),
        ):
            torch.testing.assert_close(fn.reduce(row), whole(row), equal_nan=True)
            torch.testing.assert_close(fn.scan(row), running(row, 0).values, equal_nan=True)
        table = row[: len(row) // 10 * 10].view(-1, 10)
        torch.testing.assert_close(largest.reduce(table, 0), table.amax(0), equal_nan=True)


def test_reductions_of_bools_and_of_what_the_dtype_would_cut():
    add, times = tg.vectorize(lambda a, b: a + b), tg.vectorize(lambda a, b: a * b)
    x = torch.tensor([True, False, True] * 50)
    assert add.reduce(x).item() is True
    assert times.reduce(x).item() is False
    assert add.scan(~x).tolist() == [False, *[True] * 149]
    mean = tg.vectorize(lambda a, b: (a + b) / 2)
    assert mean.reduce(torch.tensor([1.0, 2.0])).item() == 1.5
    for way in (mean.reduce, mean.scan):
        with pytest.raises(TypeError, match="of two int64 is float32, .* has the dtype of its"):
            way(torch.tensor([1, 2]))


def test_numbers_that_torch_refuses_are_refused():
    x = torch.tensor([1, 2, 3], dtype=torch.int8)
    with pytest.raises(TypeError, match="int8 to the power of -1 is no integer, as in torch"):
        tg.vectorize(lambda a: a**-1)(x)
    assert tg.vectorize(lambda a: a**-2)(x.float()).tolist() == (x.float() ** -2).tolist()
    with pytest.raises(TypeError, match="300 does not fit into int8"):
        tg.vectorize(lambda a: a if a > 2 else 300)(x)
    with pytest.raises(TypeError, match="does not fit into 64 bits: write it as a float"):
        tg.vectorize(lambda a: a + 2**70)(x)
    with pytest.raises(ValueError, match="does not fit into 64 bits: pass a float"):
        tg.vectorize(lambda a, b: a + b)(x, 2**70)


def test_conversions():
    x = torch.tensor([NAN, INF, -INF, 1e30, -1e30, 2.0**63, 3.7, -3.7, 0.0] * 5)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(tg.vectorize(lambda a: int(a))(x.to(dtype)), x.to(dtype).long())
    assert torch.equal(tg.vectorize(lambda a: bool(a))(x), x.bool())
    found = tg.vectorize(lambda a, b: int(a > 0) + int(b > 0))(x, x)
    assert torch.equal(found, 2 * (x > 0).long())
    half = tg.vectorize(lambda a: a**0.5)
    assert torch.equal(half(x).nan_to_num(7.0), (x**0.5).nan_to_num(7.0))


def test_functions_of_torch_in_an_expression():
    x = torch.tensor([-INF, -100.0, -20.0, -0.5, 0.0, 3.0, INF, NAN])
    for fn, fused in (
        (torch.relu, tg.fuse(lambda x: torch.relu(x))),
        (torch.sigmoid, tg.fuse(lambda x: torch.sigmoid(x))),
    ):
        torch.testing.assert_close(fused(x), fn(x), equal_nan=True)
    small = torch.tensor([0, 5, 200], dtype=torch.uint8)
    torch.testing.assert_close(tg.fuse(lambda x: torch.sigmoid(x))(small), torch.sigmoid(small))
    two = torch.tensor(2.0)
    assert tg.vectorize(lambda x: two + x)(x[3:5]).tolist() == [1.5, 2.0]


def slope(fn, *numbers):
    leaves = [torch.tensor(n, requires_grad=True) for n in numbers]
    return torch.autograd.grad(fn(*leaves), leaves)


ODD = {
    "max": (lambda a, b: max(a, b), torch.maximum, [(1.0, 1.0), (0.0, -0.0), (1.0, 2.0)]),
    "min": (lambda a, b: min(a, b), torch.minimum, [(1.0, 1.0), (3.0, 2.0), (NAN, 1.0)]),
    "nan": (lambda a, b: max(a, b), torch.maximum, [(NAN, 1.0), (1.0, NAN)]),
    "pow": (lambda a, b: a**b, torch.pow, [(0.0, 0.0), (0.0, 2.0), (0.0, -1.0), (-2.0, 2.0)]),
    "atan2": (lambda a, b: math.atan2(a, b), torch.atan2, [(0.0, 0.0), (1.0, -0.0)]),
    "copysign": (lambda a, b: math.copysign(a, b), torch.copysign, [(0.0, -1.0), (-3.0, 2.0)]),
    "mod": (lambda a, b: a % b, torch.remainder, [(5.0, 3.0), (-5.0, INF)]),
}


@pytest.mark.parametrize("name", ODD)
def test_gradients_at_odd_places_are_torchs(name):
    ours, theirs, places = ODD[name]
    made = tg.vectorize(ours)
    for place in places:
        found, expected = slope(made, *place), slope(theirs, *place)
        torch.testing.assert_close(found, expected, equal_nan=True, msg=f"{place} {found}")


def test_gradients_of_a_number_and_a_constant():
    relu, clamp = tg.vectorize(lambda x: max(0.0, x)), tg.vectorize(lambda x: max(x, 0.0))
    size = tg.vectorize(lambda x: abs(x))
    for x in (0.0, -1.0, 2.0, NAN):
        torch.testing.assert_close(slope(relu, x), slope(torch.relu, x))
        torch.testing.assert_close(slope(size, x), slope(torch.abs, x))
        if x == x:
            torch.testing.assert_close(slope(clamp, x), slope(lambda t: t.clamp(min=0.0), x))
    # What is infinite in the operand that is not taken does not meet a zero.
    guarded = tg.vectorize(lambda x: max(math.sqrt(x), x + 1))
    assert slope(guarded, 0.0)[0].item() == 1.0
