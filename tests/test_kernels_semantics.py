"""A kernel computes what its function means in Python, or the function is refused by name."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import taskgrad as tg

X = torch.tensor([1.0, 2.0, 4.0])
log: list[Any] = []
counter = 0
numbers = itertools.count()
generator = (n for n in range(10))
stream, uniform = random.Random(0), random.uniform
state = torch.tensor(2.0)
settings = types.SimpleNamespace(slope=3.0)
COEFFICIENTS, NAMED, ARRAY = [1.0, 2.0], {"a": 2.0}, np.array([1.0, 2.0, 3.0])


class Counter:
    def __init__(self):
        self.n = 0

    def next(self):
        self.n += 1
        return self.n

    def twice(self, x):
        return 2 * x


count = Counter()


def random_module(x):
    return x + random.random()


def random_object(x):
    return x + stream.random()


def random_function(x):
    return x + uniform(0, 1)


def random_of_numpy(x):
    return x + np.random.rand()


def random_of_torch(x):
    return x + torch.rand(())


def random_in_a_loop(x):
    while x > 1:
        x = x / 2
    return x + np.random.rand()


def random_in_a_helper(x):
    return random_module(x)


def clock(x):
    return x + time.perf_counter()


def environment(x):
    return x + len(os.environ)


def global_counter(x):
    global counter
    counter += 1
    return x + counter


def around():
    n = 0

    def nonlocal_counter(x):
        nonlocal n
        n += 1
        return x + n

    return nonlocal_counter


def attribute(x):
    return x + count.next()


def appends(x):
    log.append(x)
    return x


def appends_by_another_name(x):
    other = log
    other.append(x)
    return x


def iterator(x):
    return x + next(numbers)


def consumed(x):
    return x + sum(generator)


def changes_a_tensor(x):
    return state.add_(1.0) + x


def prints(x):
    print(x)
    return x


def generates(x):
    yield x


def tries(x):
    try:
        return 1 / x
    except ZeroDivisionError:
        return 0.0


def imports(x):
    from random import random as draw

    return x + draw()


def looks_up(x):
    return {1.0: 2.5}.get(x, 0.5)


def unassigned(x):
    if x > 2:
        n = 1.0
    return x + n


def unassigned_after_a_loop(x):
    while x > 2:
        n = x
        x = x / 2
    return n


def nothing_in_a_branch(x):
    if x > 2:
        return x


def nothing_after_a_loop(x):
    while x > 2:
        x = x / 2
    if x > 1.5:
        return x


def imaginary(x):
    return x * 1j


def two_values(x):
    return x, x


def as_text(x):
    return len(str(x))


def formatted(x):
    return len(f"{x:.3f}")


def kind_of_number(x):
    return 1.0 if isinstance(x, float) else 2.0


def kind_after_a_loop(x):
    while x > 1:
        x = x / 2
    return 1.0 if isinstance(x, float) else 2.0


def type_of_number(x):
    return 1.0 if type(x) is float else 2.0


def matches_a_class(x):
    match x:
        case float():
            return 1.0
    return 2.0


def identity(x):
    y = x
    return 1.0 if y is x else 2.0


def large_integer(x):
    return x + 2**70


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (random_module, "it uses the module random"),
    (random_object, "it uses stream of random"),
    (random_function, "it uses uniform of random"),
    (random_of_numpy, "line .*numpy.random"),
    (random_of_torch, "depends on something that changes"),
    (random_in_a_loop, "line .*numpy.random"),
    (random_in_a_helper, "it uses the module random"),
    (clock, "it uses the module time"),
    (environment, "it uses the module os"),
    (global_counter, "line .*sets the global counter"),
    (around(), "line .*sets n of the function around"),
    (attribute, "line .*sets the attribute n"),
    (appends, "line .*log.append changes something outside"),
    (appends_by_another_name, "a list from outside is changed"),
    (iterator, "it uses numbers, a count"),
    (consumed, "it uses generator, a generator"),
    (changes_a_tensor, "changes a tensor outside"),
    (prints, "line .*print is no function of numbers"),
    (generates, "a generator or coroutine"),
    (tries, "line .*handles errors"),
    (imports, "line .*imports"),
    (looks_up, "looks_up may give None"),
    (unassigned, "n may have no value here"),
    (unassigned_after_a_loop, "n may have no value here"),
    (nothing_in_a_branch, "nothing_in_a_branch may give None"),
    (nothing_after_a_loop, "nothing_after_a_loop may give None"),
    (imaginary, "imaginary gives complex"),
    (two_values, "two_values gives UniTuple"),
    (as_text, "line .*str is no function of numbers"),
    (formatted, "line .*writes a number as text"),
    (kind_of_number, "what kind of number"),
    (kind_after_a_loop, "another type than Python's"),
    (type_of_number, "what kind of number"),
    (matches_a_class, "line .*matches a class"),
    (identity, "line .*compares numbers with `is`"),
    (large_integer, "does not fit into 64 bits"),
]


@pytest.mark.parametrize(("fn", "said"), REFUSED, ids=[fn.__name__ for fn, _ in REFUSED])
def test_what_would_mean_something_else_is_refused(fn, said):
    with pytest.raises(TypeError, match=said) as caught:
        tg.vectorize(fn)(X)
    assert fn.__name__ in str(caught.value)


def test_nothing_outside_has_changed():
    assert (log, counter, count.n, state.item(), next(numbers)) == ([], 0, 0, 2.0, 0)


def test_the_same_holds_for_derivatives_and_for_fuse():
    with pytest.raises(TypeError, match="the derivative of square cannot be compiled: .* random"):
        tg.vectorize(square, derivative=random_module)(X)
    leaf = X.clone().requires_grad_()
    with pytest.raises(TypeError, match="may give None"):
        tg.vectorize(square, derivative=nothing_after_a_loop)(leaf).sum().backward()
    with pytest.raises(TypeError, match="cannot be fused: .* random"):
        tg.fuse(random_module)


def square(x):
    return x * x


def constants(x):
    kept = COEFFICIENTS[0] * x + COEFFICIENTS[1] + NAMED["a"] + ARRAY[2] + np.float32(0.5)
    return kept + settings.slope + count.twice(x) + state


def contains(x):
    return 1.0 if x in (1, 2) else 0.0


def between(x):
    return 1.0 if 1 < x <= 2 else 0.0


def either(x):
    return (x > 1 and x) or 3.0


def walrus(x):
    return (y := x * 2) + y


def middle(x):
    return sorted([x, 2.0, 3.0])[1]


def two_kinds(x):
    return 1 if x > 1 else 2.5


def breaks(x):
    total = 0.0
    for i in range(50):
        total += i
        if total > x:
            break
    return total + i


def matches(x):
    match x:
        case 1:
            return 10.0
        case 2:
            return 20.0
    return 0.0


def raises(x):
    if x > 5:
        raise ValueError("too large")
    return x


def local_state(x):
    total = 0.0
    parts = [0.0] * 3

    def add(v):
        nonlocal total
        total += v

    add(x)
    add(2 * x)
    parts[1] = x
    parts.append(x)
    return total + sum(parts)


def polynomial(x):
    return sum(c * x**i for i, c in enumerate(COEFFICIENTS))


def halvings(x):
    n = 0
    while x > 1:
        x, n = x / 2, n + 1
    return n + x


SAME = [
    *(constants, contains, between, either, walrus, middle, two_kinds, breaks, matches),
    *(raises, local_state, polynomial, halvings),
]


@pytest.mark.parametrize("fn", SAME, ids=lambda fn: fn.__name__)
def test_what_means_the_same_is_compiled(fn):
    found = tg.vectorize(fn)(X)
    assert found.tolist() == [float(fn(x)) for x in X.tolist()]


def test_errors_of_the_function_are_its_own():
    with pytest.raises(ValueError, match="too large"):
        tg.vectorize(raises)(10 * X)
    table = tg.vectorize(lambda x: ARRAY[int(x)])
    with pytest.raises(IndexError):
        table(100 * X)


def digits(a, b):
    while a > 1000:
        a = a - 1
    return (a // b) * 1000 + a % b + max(a, b) + (b << 3)


def floats(a, b):
    while a > 1000:
        a = a - 1
    return math.floor(a) + max(a, b) + a // b + a % b + int(b)


def test_without_a_formula_the_arithmetic_is_the_same():
    fn, low = tg.vectorize(digits), torch.iinfo(torch.int64).min
    a, b = torch.tensor([low, 7, -7, 7]), torch.tensor([-1, -2, 2, 3])
    expected = (a // b) * 1000 + a % b + torch.maximum(a, b) + (b << 3)
    assert torch.equal(fn(a, b), expected)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        fn(a, 0 * b)
    small = torch.tensor([-128, 100], dtype=torch.int8)
    assert fn(small, small // small * -1).tolist() == [127991, -99908]
    x, y = torch.tensor([math.nan, 2.5, -7.5, 3.0]), torch.tensor([1.0, math.nan, 2.0, 0.0])
    expected = x.floor() + torch.maximum(x, y) + x // y + x % y + y.long()
    torch.testing.assert_close(tg.vectorize(floats)(x, y), expected, equal_nan=True)


def test_the_meaning_travels(client):
    """What was refused here is refused on a worker; what was read here is computed there."""
    assert tg.collect(tg.spawn(tg.vectorize(polynomial), X)).tolist() == [3.0, 5.0, 9.0]
    assert tg.collect(tg.spawn(tg.vectorize(halvings), X)).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(Exception, match="looks_up may give None"):
        tg.collect(tg.spawn(tg.vectorize(looks_up), X))
