"""Vectorized functions forward: minitorch's cases, every layout and dtype, out=, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgrad as tg
from scalar_functions import ONE, TWO, sigmoid

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4, dtype=torch.float64),
    "permuted": lambda: torch.randn(4, 3, dtype=torch.float64).t(),
    "strided": lambda: torch.randn(6, 8, dtype=torch.float64)[::2, ::2],
    "expanded": lambda: torch.randn(3, 1, dtype=torch.float64).expand(3, 4),
    "broadcast": lambda: torch.randn(4, dtype=torch.float64),
}
KERNELS = {name: tg.vectorize(fn) for name, (fn, _) in (ONE | TWO).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_argument(name, layout):
    x = LAYOUTS[layout]()
    expected = ONE[name][1](x)
    found = KERNELS[name](x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_arguments(name, layout):
    x, y = LAYOUTS["contiguous"](), LAYOUTS[layout]()
    for a, b in ((x, y), (y, x)):
        expected = TWO[name][1](a, b)
        found = KERNELS[name](a, b)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("name", ONE)
def test_gradients_at_every_element(name):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(KERNELS[name], LAYOUTS["contiguous"]().requires_grad_())


@pytest.mark.parametrize("name", TWO)
def test_gradients_at_every_element_of_two(name):
    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 1), 4)]
    assert torch.autograd.gradcheck(KERNELS[name], inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_every_layout(layout):
    torch.manual_seed(0)
    x, y = LAYOUTS[layout]().requires_grad_(), LAYOUTS["contiguous"]().requires_grad_()
    found = torch.autograd.grad(KERNELS["div2"](x, y).sum(), (x, y))
    expected = torch.autograd.grad(TWO["div2"][1](x, y).sum(), (x, y))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_broadcasting():
    add = KERNELS["add2"]
    x, y = torch.randn(5, 1, 5, 1), torch.randn(1, 5, 1, 5)
    assert torch.equal(add(x, y), x + y)
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5,\) do not broadcast"):
        add(torch.zeros(5, 2), torch.zeros(5))


def test_broadcast_gradients_are_summed_back():
    x = torch.randn(5, 1, 5, 1, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 1, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 5, 5, 5, dtype=torch.float64)
    found = torch.autograd.grad(KERNELS["mul2"](x, y), (x, y), g)
    expected = torch.autograd.grad(x * y, (x, y), g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


PAIRS = [
    *(((700, 90), (90,)), ((700, 90), (700, 1)), ((700, 90), ()), ((70_001, 3), (3,))),
    *(((70_001,), (1,)), ((3, 100, 50), (1, 100, 1)), ((3, 100, 50), (3, 1, 50))),
    *(((64, 30, 7, 7), (30, 1, 1)), ((5, 1, 5, 1), (1, 5, 1, 5)), ((0, 3), (3,))),
]


@pytest.mark.parametrize("shapes", PAIRS, ids=str)
def test_broadcast_gradients_are_summed_as_they_are_made(shapes):
    """Neither the layout nor the number of threads decides what is summed, or its bits."""
    torch.manual_seed(0)
    x, y = (torch.randn(shape, requires_grad=True) for shape in shapes)
    made = KERNELS["mul2"](x, y)
    g = torch.randn(made.shape)
    across = g.movedim(0, -1).contiguous().movedim(-1, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads, cotangent in ((1, g), (2, g), (7, g), (2, across)):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(made, (x, y), cotangent, retain_graph=True))
    finally:
        torch.set_num_threads(before)
    wide = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    expected = torch.autograd.grad(wide[0] * wide[1], wide, g.double())
    for mine in found:
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-4)
    for other in found[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_broadcast_gradients_write_only_what_is_asked():
    x, y = torch.randn(700, 90, requires_grad=True), torch.randn(90, requires_grad=True)
    fn = tg.vectorize(lambda x, y: x * y)
    torch.autograd.grad(fn(x, y), (x, y), torch.randn(700, 90))
    (row,) = [row for row in fn.explain().kernels if row.part == "pullback(0,1)"]
    assert row.along == "uuuur"  # the second one's gradient: one row a block
    (call,) = [call for call in fn.explain().calls if call.part == "pullback(0,1)"]
    assert call.bytes < 1.1 * 4 * (3 * 700 * 90 + 90)


def test_a_sum_of_half_precision_is_rounded_once():
    x = torch.ones(1000, 3, dtype=torch.bfloat16)
    y = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    KERNELS["mul2"](x, y).backward(torch.ones(1000, 3, dtype=torch.bfloat16))
    assert y.grad.tolist() == [1000.0] * 3  # in bfloat16 all the way it would stop at 256


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@st.composite
def tensors(draw, rank_of=shapes):
    """Two tensors that broadcast together, of any strides."""
    shape = draw(rank_of)
    found = []
    for _ in range(2):
        own = [draw(st.sampled_from([size, 1])) for size in shape]
        order = draw(st.permutations(range(len(own))))
        steps = [draw(st.integers(1, 3)) for _ in own]
        lead = draw(st.integers(0, len(own)))
        big = torch.randn([own[d] * steps[d] for d in order], dtype=torch.float64)
        view = big.permute([order.index(d) for d in range(len(own))])
        for d, step in enumerate(steps):
            view = view[(slice(None),) * d + (slice(None, None, step),)]
        if all(size == 1 for size in own[:lead]):
            view = view.reshape(own[lead:])
        found.append(
            view.expand([*shape[len(shape) - view.dim() :]]) if draw(st.booleans()) else view
        )
    return found


@settings(max_examples=200)
@given(tensors())
def test_any_strides(pair):
    x, y = pair
    expected = x - y * 2
    found = minus_twice(x, y)
    assert torch.equal(found, expected)


minus_twice = tg.vectorize(lambda x, y: x - y * 2)


@pytest.mark.parametrize("shape", [(65, 130), (70, 3, 90)])
def test_operands_that_lie_across_each_other(shape):
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape[::-1], dtype=torch.float64)
    order = tuple(reversed(range(len(shape))))
    across = y.permute(order)
    assert torch.equal(minus_twice(x, across), x - across * 2)
    assert "t" in minus_twice.explain().kernels[-1].along or len(shape) == 3


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 70_001])
def test_many_blocks(count):
    x, y = torch.randn(count, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    assert torch.equal(minus_twice(x, y), x - y * 2)
    shifted = torch.empty(count + 1, dtype=torch.float64)[1:]
    assert torch.equal(minus_twice(x, y, out=shifted), x - y * 2)


def test_long_rows_of_a_matrix():
    x, y = (
        torch.randn(401, 3001, dtype=torch.float64)[:, 1:],
        torch.randn(3000, dtype=torch.float64),
    )
    assert torch.equal(minus_twice(x, y), x - y * 2)


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
mixed = tg.vectorize(lambda x, y: x * y + x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    x = torch.arange(-3, 5).to(dtype)
    for other in (torch.int64, torch.float32):
        y = torch.arange(8).to(other)
        found, expected = mixed(x, y), x * y + x
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    exact = everything.double().abs() + 1  # and so is the square root, to twice float32's digits
    expected = exact.float().double().sqrt().float().to(dtype)
    assert torch.equal(square_root(everything).nan_to_num(), expected.nan_to_num())


square_root = tg.vectorize(lambda x: math.sqrt(abs(x) + 1))


def test_numbers_and_tensors_without_dimensions_give_way():
    x = torch.ones(3)
    assert mixed(x, 2).dtype == torch.float32
    assert mixed(x, 2.5).dtype == torch.float32
    assert mixed(x, torch.tensor(2.5, dtype=torch.float64)).dtype == torch.float32
    assert mixed(torch.ones(3, dtype=torch.int32), 2).dtype == torch.int32
    assert mixed(torch.ones(3, dtype=torch.int32), 2.5).dtype == torch.float32
    assert torch.equal(mixed(2.0, x), torch.full((3,), 4.0))
    assert mixed(1, 2).item() == 3
    assert mixed(torch.tensor(2.0), torch.tensor(3.0)).shape == ()


def test_whole_numbers():
    fn = tg.vectorize(lambda a, b: (a // b) * 100 + a % b)
    a, b = torch.tensor([7, -7, 7, -7]), torch.tensor([2, 2, -2, -2])
    assert torch.equal(fn(a, b), torch.div(a, b, rounding_mode="floor") * 100 + a % b)
    bits = tg.vectorize(lambda a, b: (a & b) ^ (a << 1) | ~b)
    assert torch.equal(bits(a, b), (a & b) ^ (a << 1) | ~b)
    assert tg.vectorize(lambda a: a / 2)(a).dtype == torch.float32
    wraps = tg.vectorize(lambda a: a * a)(torch.tensor([100], dtype=torch.int8))
    assert torch.equal(wraps, torch.tensor([100], dtype=torch.int8) ** 2)
    assert tg.vectorize(lambda a, b: a > b)(a, b).dtype == torch.bool
    with pytest.raises(TypeError, match="takes whole numbers"):
        bits(a.float(), b)


def test_special_values():
    values = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, -3e38, 88.9, -104.5]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype).repeat(5)
        for name in ("exp", "log", "tanh", "expm1", "log1p", "erf"):
            found = tg.vectorize(FUNCTIONS[name])(x)
            wide = getattr(torch, name)(x.double()).to(dtype)
            torch.testing.assert_close(found, wide, equal_nan=True, rtol=4e-7, atol=1e-44)
            assert torch.equal(found.signbit(), wide.signbit()) or name == "log"
    x = torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(tg.vectorize(lambda x: x / 0.0)(x)[:2], torch.tensor([math.inf, -math.inf]))


FUNCTIONS = {
    "exp": lambda x: math.exp(x),
    "log": lambda x: math.log(x),
    "tanh": lambda x: math.tanh(x),
    "expm1": lambda x: math.expm1(x),
    "log1p": lambda x: math.log1p(x),
    "erf": lambda x: math.erf(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name):
    """Within 2.5 units in the last place of float32."""
    low, high = (1e-6, 1e6) if name.startswith("log") else (-20, 20)
    x = torch.linspace(low, high, 200_001)
    exact = getattr(torch, name)(x.double())
    unit = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
    found = tg.vectorize(FUNCTIONS[name])(x)
    assert ((found.double() - exact).abs() / unit).max() < 2.5


def test_out():
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = x - y * 2
    for out in (torch.empty(4, 3, dtype=torch.float64), torch.empty(3, 4, dtype=torch.float64).t()):
        assert minus_twice(x, y, out=out) is out
        assert torch.equal(out, expected)
    narrow = torch.empty(4, 3)
    assert torch.equal(minus_twice(x, y, out=narrow), expected.float())
    inplace = x.clone()
    assert torch.equal(minus_twice(inplace, y, out=inplace), expected)
    row = torch.arange(10.0, dtype=torch.float64)
    crossing = minus_twice(row[:-1].clone(), row[:-1].clone())
    assert torch.equal(minus_twice(row[:-1], row[:-1], out=row[1:]), crossing)
    with pytest.raises(ValueError, match=r"shape \(3, 4\); the result's is \(4, 3\)"):
        minus_twice(x, y, out=torch.empty(3, 4))
    with pytest.raises(TypeError, match="does not fit"):
        minus_twice(x, y, out=torch.empty(4, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="out= has no gradients"):
        minus_twice(x.requires_grad_(), y, out=torch.empty(4, 3))


def test_out_is_looked_at_again_where_only_memory_differs():
    """What fits is known from the first call; that memory crosses, or is conjugate, is not."""
    row, apart = torch.arange(9.0), torch.empty(8)
    expected = row[:-1] - row[:-1] * 2
    minus_twice(row[:-1], row[:-1], out=apart)
    negative = torch.zeros(8, dtype=torch.complex64).conj().imag
    minus_twice(row[:-1], row[:-1], out=negative)
    assert negative.is_neg()
    assert torch.equal(negative, expected)
    minus_twice(row[:-1], row[:-1], out=row[1:])
    assert torch.equal(apart, expected)
    assert torch.equal(row[1:], expected)
    for _ in range(2):
        with pytest.raises(ValueError, match="has the shape"):
            minus_twice(apart, apart, out=torch.empty(7))


def test_out_goes_by_the_default_dtype_of_the_call():
    half = tg.vectorize(lambda x: x / 2)
    x, out = torch.arange(4), torch.empty(4)
    assert half(x, out=out).tolist() == [0, 0.5, 1, 1.5]
    torch.set_default_dtype(torch.float64)
    try:
        assert half(x, out=out).tolist() == [0, 0.5, 1, 1.5]
        assert half.explain().kernels[-1].signature == "(int64) -> float64"
    finally:
        torch.set_default_dtype(torch.float32)


def test_empty_and_meta():
    empty = torch.empty(0, 3, dtype=torch.float64)
    assert minus_twice(empty, 1.0).shape == (0, 3)
    assert minus_twice(empty, torch.empty(1, 3, dtype=torch.float64)).shape == (0, 3)
    made = minus_twice(torch.empty(4, 1, device="meta"), torch.empty(3, device="meta"))
    assert made.is_meta
    assert made.shape == (4, 3)


def test_what_is_refused():
    with pytest.raises(TypeError, match="takes 2 arguments; got 1"):
        minus_twice(torch.ones(1))
    with pytest.raises(TypeError, match="takes tensors and numbers; got str"):
        minus_twice(torch.ones(1), "2")
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        minus_twice(torch.ones(1, dtype=torch.complex64), 1)
    with pytest.raises(TypeError, match="vectorize takes a function; got int"):
        tg.vectorize(3)
    with pytest.raises(TypeError, match=r"a fixed number; \*args"):
        tg.vectorize(lambda *args: args[0])
    with pytest.raises(TypeError, match="takes no arguments"):
        tg.vectorize(lambda: 1)


def test_defaults():
    leaky = tg.vectorize(lambda x, slope=0.5: x if x > 0 else slope * x)
    x = torch.tensor([-2.0, 2.0])
    assert leaky(x).tolist() == [-1.0, 2.0]
    assert leaky(x, 0.25).tolist() == [-0.5, 2.0]


def test_views_with_a_sign_to_come():
    imaginary = torch.tensor([1 + 2j]).conj().imag
    assert imaginary.is_neg()
    assert tg.vectorize(lambda x: 3 * x)(imaginary).item() == -6


def test_composition_is_one_loop():
    f, g = tg.vectorize(sigmoid), tg.vectorize(lambda a, b: a * b + 1)

    @tg.vectorize
    def both(x, y):
        return g(f(x), y)

    fused = tg.fuse(lambda x, y: g(f(x), y))
    x, y = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = torch.sigmoid(x) * y + 1
    for made in (both, fused):
        torch.testing.assert_close(made(x, y), expected)
        assert [row.part for row in made.explain().kernels] == ["forward"]
    mish = tg.fuse(lambda x: x * torch.tanh(torch.log1p(torch.exp(x))))
    torch.testing.assert_close(mish(x), torch.nn.functional.mish(x))
    with pytest.raises(TypeError, match=r"line \d+, .*torch.softmax cannot be written"):
        tg.fuse(lambda x: torch.softmax(x, 0))


def test_explain():
    fn = tg.vectorize(lambda x: 3 * x - 1)
    assert "nothing yet" in str(fn.explain())
    fn(torch.randn(300_000))
    fn(torch.randn(10, 20)[:, ::2])
    explained = fn.explain()
    assert {(row.along, row.aligned) for row in explained.kernels} == {("uu", True), ("su", False)}
    assert explained.kernels[0].signature == "(float32) -> float32"
    assert explained.kernels[0].vector_bits >= 128
    assert explained.calls[0].bytes == 2 * 100 * 4
    assert "mul(3, a0)" in str(explained)
    add = tg.vectorize(lambda a, b: a + b)
    add.reduce(torch.randn(300_000))
    add.scan(torch.randn(10))
    calls = {call.part: call for call in add.explain().calls}
    assert calls["reduce"].bytes == 4 * 300_001
    assert calls["reduce"].threads == min(torch.get_num_threads(), calls["reduce"].blocks)
    assert calls["reduce"].gb_per_s > 0
    assert calls["scan"].blocks == 1
