"""What can be read and derived, and what not; autograd, torch.func, torch.compile, pickle."""

from __future__ import annotations

import math
import pickle
from math import atan2, hypot

import cloudpickle
import pytest
import torch
from torch import func
from torch.autograd import gradcheck, gradgradcheck

import taskgrad as tg

SLOPE = 0.25


def helper(x, y):
    low, high = min(x, y), max(x, y)
    return high - SLOPE * low


@tg.vectorize
def mixed(x, y):
    """Locals, a closure's constant, a loop, other functions, conditionals."""
    total = 0.0
    for power in range(1, 4):
        total += x**power / power
    if x > 0 and y < 1:
        total = total * math.tanh(y)
    elif not x < -1:
        total -= helper(x, y)
    return total + atan2(y, x * x + 1) + hypot(x, y + 3) + abs(y) + (x > y) * x


def inputs(*shape):
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_reading_gives_what_python_gives():
    x, y = (t.detach() for t in inputs(50))
    expected = [mixed.__wrapped__(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    torch.testing.assert_close(mixed(x, y), torch.tensor(expected, dtype=torch.float64))


def test_derivatives_twice_and_forward():
    x, y = inputs(4, 3)
    assert gradcheck(mixed, (x, y), check_forward_ad=True)
    assert gradgradcheck(mixed, (x, y))
    row = y[0].detach().requires_grad_()
    assert gradcheck(mixed, (x, row))
    assert gradgradcheck(mixed, (x, row))


DOMAINS = {
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "cbrt"), (0.2, 3)),
    **dict.fromkeys(("asin", "acos", "atanh"), (-0.9, 0.9)),
    "acosh": (1.1, 3),
}
EVERY = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc"),
)


@pytest.mark.parametrize("half", [0, 1])
def test_every_function_of_math(half):
    """All in one formula for each half: compiling each by itself would take long."""
    names = EVERY[half::2]
    namespace = {"math": math}
    terms = []
    for name in names:
        low, high = DOMAINS.get(name, (-0.8, 2))
        terms.append(f"math.{name}({(low + high) / 2} + {(high - low) / 2} * x)")
    exec(f"def every(x): return {' + '.join(terms)}", namespace)
    x = torch.linspace(-0.95, 0.95, 7, dtype=torch.float64, requires_grad=True)
    fn = tg.vectorize(namespace["every"])
    expected = [namespace["every"](v) for v in x.tolist()]
    torch.testing.assert_close(fn(x).detach(), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(fn, x)


def test_powers():
    fn = tg.vectorize(lambda x, y: x**y + x**3 + x**-2 + x**0.5 + 2**y + x % y)
    x = torch.tensor([0.5, 1.5, 2.2], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([2.0, 0.7, 1.3], dtype=torch.float64, requires_grad=True)
    assert gradcheck(fn, (x, y))
    zero = torch.zeros(1, requires_grad=True)
    power = tg.vectorize(lambda x, y: x**y)
    two = torch.full((1,), 2.0, requires_grad=True)
    assert [g.item() for g in torch.autograd.grad(power(zero, two), (zero, two))] == [0, 0]


def test_a_branch_not_taken_does_not_spoil_the_gradient():
    fn = tg.vectorize(lambda x: math.sqrt(x) if x > 0 else 0.0 * x)
    x = torch.tensor([-1.0, 0.0, 4.0], requires_grad=True)
    (g,) = torch.autograd.grad(fn(x).sum(), x)
    assert g.tolist() == [0.0, 0.0, 0.25]


def test_a_derivative_that_is_given():
    fn = tg.vectorize(lambda x, y: x * y, derivative=lambda x, y: (2 * y, 3 * x))
    x, y = inputs(5)
    gx, gy = torch.autograd.grad(fn(x, y).sum(), (x, y), create_graph=True)
    assert torch.equal(gx, 2 * y)
    assert torch.equal(gy, 3 * x)
    assert torch.equal(torch.autograd.grad(gx.sum(), y)[0], torch.full((5,), 2.0).double())
    outer = tg.vectorize(lambda x: fn(x, x) + x)
    assert torch.equal(torch.autograd.grad(outer(x).sum(), x)[0], 2 * x + 3 * x + 1)

    @tg.vectorize(derivative=lambda x: 1.0 / x)
    def logarithm(x):
        return math.log(x)

    assert logarithm.__name__ == "logarithm"
    wrong = tg.vectorize(lambda x, y: x * y, derivative=lambda x, y: y)
    with pytest.raises(ValueError, match="must give a tuple of 2 values"):
        wrong(x, y)


def halvings(x):
    n = 0
    while x > 1.0:
        x = x / 2
        n += 1
    return n + x


def test_what_cannot_be_derived_says_so():
    fn = tg.vectorize(halvings)
    x = torch.tensor([0.5, 3.0, 100.0])
    assert fn(x).tolist() == [halvings(v) for v in x.tolist()]
    assert fn(x).dtype == torch.float32
    pattern = r"derivative of halvings .*line \d+, `while x > 1.0:`: .*[Gg]ive .*derivative="
    with pytest.raises(tg.DerivativeError, match=pattern):
        fn(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(tg.DerivativeError, match="lgamma has no derivative here"):
        tg.vectorize(lambda x: math.lgamma(x))(x.clone().requires_grad_()).sum().backward()

    given = tg.vectorize(halvings, derivative=halvings)  # as good as any
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(given(leaf).sum(), leaf, create_graph=True)
    assert g.tolist() == fn(x).tolist()
    with pytest.raises(tg.DerivativeError, match="the derivative of halvings cannot be derived"):
        g.sum().backward()
    composed = tg.vectorize(lambda x: given(x) * 2)
    assert composed(x).tolist() == (2 * fn(x)).tolist()
    with pytest.raises(TypeError, match="neither read as a formula .* nor compiled by Numba"):
        tg.vectorize(lambda x: x.imaginary_part + [x].pop().nothing)(x)
    assert torch.autograd.grad(composed(leaf).sum(), leaf)[0].tolist() == (2 * fn(x)).tolist()


def test_torch_func():
    x, y = (t.detach() for t in inputs(4, 3))
    gx, gy = func.grad(lambda x, y: mixed(x, y).sum(), argnums=(0, 1))(x, y)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.autograd.grad(mixed(*leaves).sum(), leaves)
    assert torch.equal(gx, expected[0])
    assert torch.equal(gy, expected[1])
    for a, b, dims in (
        (x, y, (0, 0)),
        (x, y, (1, 1)),
        (x, y[0], (0, None)),
        (x[0], y.t(), (None, 1)),
    ):
        found = func.vmap(mixed, in_dims=dims)(a, b)
        pairs = list(zip((a, b), dims, strict=True))
        count = next(t.shape[d] for t, d in pairs if d is not None)
        each = [
            mixed(*[t if d is None else t.select(d, i) for t, d in pairs]) for i in range(count)
        ]
        assert torch.equal(found, torch.stack(each))
    value, tangent = func.jvp(lambda x: mixed(x, y), (x,), (torch.ones_like(x),))
    assert torch.equal(value, mixed(x, y))
    assert torch.equal(tangent, gx)
    hessian = func.hessian(lambda x: mixed(x, y[0]).sum())(x[0])
    assert torch.equal(hessian, hessian.diag().diag())
    per_sample = func.vmap(func.grad(lambda x, y: mixed(x, y).sum()))(x, y)
    assert torch.equal(per_sample, gx)


def test_torch_compile_in_one_graph():
    x, y = inputs(4, 3)
    product = tg.vectorize(lambda a, b: a * b)

    def model(x, y):
        return (mixed(x * 2, y) + product(x, 2.5)).relu().sum() + product.reduce(y, 1).sum()

    compiled = torch.compile(model)
    found = torch.autograd.grad(compiled(x, y), (x, y))
    expected = torch.autograd.grad(model(x, y), (x, y))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    whole = torch.compile(lambda x, y: mixed(x * 2, y).relu(), fullgraph=True)
    assert torch.equal(whole(x, y), mixed(x * 2, y).relu())


def test_many_conditionals():
    def clamped(x):
        for bound in range(9):  # each min and max selects: 2**18 ways would be too many
            x = max(min(x, 10 - bound), bound - 10)
        for bound in range(8):
            x = x + 1 if x > bound else x
        return x

    fn = tg.vectorize(clamped)
    x = torch.linspace(-12, 12, 25, requires_grad=True)
    assert fn(x).tolist() == [clamped(v) for v in x.tolist()]
    (g,) = torch.autograd.grad(fn(x).sum(), x)
    assert g.tolist() == [float(abs(v) <= 2) for v in x.tolist()]


def test_batched_gradients_of_the_old_kind_are_refused():
    x = torch.ones(3, requires_grad=True)
    y = tg.vectorize(lambda x: x * x)(x)
    with pytest.raises(RuntimeError, match="is_grads_batched=True .* use torch.func.vmap"):
        torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)


def test_torchs_default_dtype():
    half = tg.vectorize(lambda x: x / 2)
    whole = torch.arange(3)
    assert half(whole).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert half(whole).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_have_the_dtypes_of_their_arguments():
    product = tg.vectorize(lambda a, b: a * b)
    a = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    ga, gb = torch.autograd.grad(product(a, b).sum(), (a, b))
    assert torch.equal(ga, b.detach().bfloat16())
    assert torch.equal(gb, a.detach().float())
    counts = torch.arange(3)
    assert torch.equal(torch.autograd.grad(product(b, counts).sum(), b)[0], counts.float())
    assert not tg.vectorize(lambda a, b: a > b)(a, b).requires_grad


def test_pickles_without_the_source():
    namespace = {"tg": tg, "math": math, "SLOPE": 3.0}
    exec("scaled = tg.vectorize(lambda x: math.exp(SLOPE * x))", namespace)
    fn = namespace["scaled"]
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    again = pickle.loads(pickle.dumps(fn))
    assert torch.equal(again(x), fn(x))
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (fn, again)))
    loops = cloudpickle.loads(cloudpickle.dumps(tg.vectorize(halvings)))
    assert loops(torch.tensor([3.0])).item() == halvings(3.0)
    layer = pickle.loads(pickle.dumps(tg.Elementwise(fn)))
    assert torch.equal(layer(x), fn(x))
