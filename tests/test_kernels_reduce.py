"""Reductions and scans: minitorch's cases, order, accuracy, gradients, threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func
from torch.autograd import gradcheck, gradgradcheck

import taskgrad as tg

add = tg.vectorize(lambda a, b: a + b)
times = tg.vectorize(lambda a, b: a * b)
last = tg.vectorize(lambda a, b: b)
logaddexp = tg.vectorize(lambda a, b: max(a, b) + math.log1p(math.exp(-abs(a - b))))
TABLE = torch.tensor([[2.0, 3.0], [4.0, 6.0], [5.0, 7.0]])


def test_minitorchs_sums():
    assert add.reduce(TABLE, 0).tolist() == [11, 16]
    assert add.reduce(TABLE, 1).tolist() == [5, 10, 12]
    assert add.reduce(TABLE).item() == 27
    assert add.reduce(TABLE, (0, 1), keepdim=True).tolist() == [[27]]
    assert add.reduce(TABLE, 0, start=100).tolist() == [111, 116]
    assert torch.equal(times.outer(TABLE, TABLE[0]), TABLE[..., None] * TABLE[0])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 8, 9, 33]), min_size=1, max_size=3))
    shape[draw(st.integers(0, len(shape) - 1))] *= draw(st.sampled_from([1, 37]))
    x = torch.randn(shape, dtype=torch.float64).permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()):
        x = x[..., ::2]
    dims = draw(st.lists(st.integers(0, x.dim() - 1), min_size=1, unique=True))
    return x, tuple(dims)


@settings(max_examples=100)
@given(tensors())
def test_any_strides_and_dimensions(case):
    x, dims = case
    torch.testing.assert_close(add.reduce(x, dims), x.sum(dims))
    torch.testing.assert_close(add.scan(x, dims[0]), x.cumsum(dims[0]))
    expected = x
    for d in sorted(dims, reverse=True):  # the order of the elements is kept
        expected = expected.select(d, -1)
    assert torch.equal(last.reduce(x, dims), expected)


@pytest.mark.parametrize("shape", [(300_000,), (70_000, 3), (3, 70_000), (1500, 300)])
def test_several_segments(shape):
    x = torch.randn(shape, dtype=torch.float64)
    for dim in range(len(shape)):
        torch.testing.assert_close(add.reduce(x, dim), x.sum(dim))
        assert torch.equal(last.reduce(x, dim), x.select(dim, -1))
        assert torch.equal(last.scan(x, dim), x)
        torch.testing.assert_close(add.scan(x, dim), x.cumsum(dim))
    torch.testing.assert_close(add.reduce(x), x.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int8])
def test_dense_rows_of_any_length_with_a_function_that_commutes(dtype):
    for length in (1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 65_536, 65_537, 140_000):
        x = (3 * torch.randn(3, length)).to(dtype)
        expected = x.double().sum(1) if dtype.is_floating_point else x.sum(1)
        for _ in range(2):  # the second one finds all as it was for the first
            found = add.reduce(x, 1)
            if dtype == torch.bfloat16:
                torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1)
            else:
                torch.testing.assert_close(found, expected.to(dtype))
        assert torch.equal(add.reduce(x[0], 0), found[0])


def test_accuracy_is_that_of_a_tree():
    ones = torch.full((5_000_000,), 0.1)
    exact = ones.double().sum()
    assert abs(add.reduce(ones) - exact) / exact < 2e-7
    columns = ones.view(-1, 50)
    assert ((add.reduce(columns, 0) - exact / 50).abs() * 50 / exact).max() < 2e-7
    assert abs(add.scan(ones)[-1] - exact) / exact < 2e-5


@pytest.mark.parametrize("shape", [(1_000_001,), (3_000, 333)])
def test_the_same_bits_whatever_the_threads(shape):
    x = torch.randn(shape)
    gelu = tg.vectorize(lambda x: 0.5 * x * (1 + math.tanh(0.8 * x + 0.036 * x**3)))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append([gelu(x), add.reduce(x), add.reduce(x, 0), add.scan(x)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("fn", [add, times, logaddexp], ids=["add", "times", "logaddexp"])
def test_gradients(fn):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    for dims in (None, 1, (0, 2)):
        assert gradcheck(lambda x, d=dims: fn.reduce(x, d), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: fn.reduce(x, (0, 2)), x)
    assert gradcheck(lambda x: fn.scan(x, 1), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: fn.scan(x, 1), x)
    fixed = x.detach()
    found = func.vmap(func.grad(lambda x: fn.reduce(x, start=1.5)))(fixed)
    each = [func.grad(lambda x: fn.reduce(x, start=1.5))(part) for part in fixed]
    torch.testing.assert_close(found, torch.stack(each))
    rows = func.vmap(lambda x: fn.scan(x, 0), in_dims=1)(fixed)
    assert torch.equal(rows, torch.stack([fn.scan(fixed[:, i], 0) for i in range(4)]))


def test_a_product_with_a_zero_has_a_gradient():
    x = torch.tensor([2.0, 0.0, 3.0], requires_grad=True)
    (g,) = torch.autograd.grad(times.reduce(x), x)
    assert g.tolist() == [0, 6, 0]


def test_known_reductions():
    x = torch.randn(40, 50, dtype=torch.float64)
    torch.testing.assert_close(logaddexp.reduce(x, 1), x.logsumexp(1))
    largest = tg.vectorize(lambda a, b: a if a > b else b)
    assert torch.equal(largest.reduce(x, 0), x.amax(0))
    assert torch.equal(largest.scan(x, 0), x.cummax(0).values)


def test_dtypes():
    for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16):
        x = torch.arange(6).view(2, 3).to(dtype)
        found = add.reduce(x, 1)
        assert found.dtype == dtype
        assert found.tolist() == [3, 12]
        assert add.scan(x, 1).tolist() == x.cumsum(1).tolist()
    ones = torch.ones(1000, dtype=torch.bfloat16)
    assert add.reduce(ones).item() == 1000  # in bfloat16 all the way it would stop at 256


def test_edges():
    empty = torch.zeros(0, 3)
    assert add.reduce(empty, 0, start=5.0).tolist() == [5, 5, 5]
    assert add.reduce(empty, 1).shape == (0,)
    assert add.scan(empty, 0).shape == (0, 3)
    assert add.reduce(torch.tensor(3.0)).item() == 3
    assert add.reduce(torch.tensor(3.0), 0).item() == 3
    assert add.scan(torch.tensor(3.0)).item() == 3
    with pytest.raises(ValueError, match="of no elements needs start="):
        add.reduce(empty)
    with pytest.raises(IndexError, match="dim=2 is out of range"):
        add.reduce(TABLE, 2)
    with pytest.raises(ValueError, match="names a dimension twice"):
        add.reduce(TABLE, (0, -2))
    with pytest.raises(TypeError, match="is for functions of two arguments"):
        tg.vectorize(lambda x: x).reduce(TABLE)
