"""Functions of collectives, for JAX and for taskgrad: `on` has the names of both.

Each case has the shape of one rank's `x`, given the number of ranks, and the function of it. The
examples, those of JAX's documentation, make their maps themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    shape: Callable[[int], tuple[int, ...]]
    write: Callable[[Any, int], Callable[[Any], Any]]
    differentiable: bool = True
    sizes: tuple[int, ...] = (1, 2, 3, 8)
    lowered: bool = True  # JAX can run it on CPU devices; else it can within vmap


def halves(n: int) -> list[list[int]]:
    return [list(range(0, n, 2)), list(range(n - 1, 0, -2))]


def ring(n: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % n) for i in range(n)]


def of(*shape: int) -> Callable[[int], tuple[int, ...]]:
    return lambda n: shape


def even(shape: Any, write: Any, **options: Any) -> Case:
    return Case(shape, write, sizes=(2, 8), **options)


CASES = {
    "square": Case(of(3), lambda on, n: lambda x: x**2),
    "psum": Case(of(3), lambda on, n: lambda x: x / on.psum(x**2, "i")),
    "psum_tree": Case(
        of(3), lambda on, n: lambda x: on.psum({"a": x, "b": (x * x, 2)}, "i")["b"][0]
    ),
    "psum_of_one": Case(of(3), lambda on, n: lambda x: x * on.psum(1, "i")),
    "pmean": Case(of(2, 3), lambda on, n: lambda x: x * on.pmean(on.sin(x), "i")),
    "pmax": Case(of(5), lambda on, n: lambda x: on.pmax(x, "i"), differentiable=False),
    "pmin": Case(of(5), lambda on, n: lambda x: on.pmin(x, "i"), differentiable=False),
    "all_gather": Case(of(2, 3), lambda on, n: lambda x: on.all_gather(x**2, "i")),
    "all_gather_axis": Case(of(2, 3), lambda on, n: lambda x: on.all_gather(x**2, "i", axis=1)),
    "all_gather_tiled": Case(
        of(2, 3), lambda on, n: lambda x: on.all_gather(x**2, "i", axis=1, tiled=True)
    ),
    "psum_scatter": Case(lambda n: (n, 3), lambda on, n: lambda x: on.psum_scatter(x**2, "i")),
    "psum_scatter_tiled": Case(
        lambda n: (3, 2 * n),
        lambda on, n: lambda x: on.psum_scatter(x**2, "i", scatter_dimension=1, tiled=True),
    ),
    # Lowered by pmap, JAX 0.10.2 cannot differentiate these two: "expected cotangent type".
    "all_to_all": Case(
        lambda n: (n, 3), lambda on, n: lambda x: on.all_to_all(x**2, "i", 0, 1), lowered=False
    ),
    "all_to_all_back": Case(
        lambda n: (3, n), lambda on, n: lambda x: on.all_to_all(x**2, "i", 1, 0), lowered=False
    ),
    "all_to_all_tiled": Case(
        lambda n: (2 * n, 3), lambda on, n: lambda x: on.all_to_all(x**2, "i", 0, 1, tiled=True)
    ),
    "ppermute": Case(of(3), lambda on, n: lambda x: x * on.ppermute(x**2, "i", ring(n))),
    "ppermute_partly": Case(
        of(3), lambda on, n: lambda x: x + on.ppermute(x**2, "i", [(0, n - 1)])
    ),
    "pshuffle": Case(of(3), lambda on, n: lambda x: on.pshuffle(x**2, "i", list(range(n))[::-1])),
    "pswapaxes": Case(lambda n: (2, n), lambda on, n: lambda x: on.pswapaxes(x**2, "i", 1)),
    "pbroadcast": Case(of(3), lambda on, n: lambda x: x * on.pbroadcast(x**2, "i", n - 1)),
    "axis_index": Case(of(3), lambda on, n: lambda x: x * on.axis_index("i") + on.axis_size("i")),
    "groups_psum": even(
        of(3), lambda on, n: lambda x: x * on.psum(x, "i", axis_index_groups=halves(n))
    ),
    "groups_pmean": even(
        of(3), lambda on, n: lambda x: x * on.pmean(x, "i", axis_index_groups=halves(n))
    ),
    "groups_pmax": even(
        of(3),
        lambda on, n: lambda x: on.pmax(x, "i", axis_index_groups=halves(n)),
        differentiable=False,
    ),
    "groups_all_gather": even(
        of(3), lambda on, n: lambda x: on.all_gather(x**2, "i", axis_index_groups=halves(n))
    ),
    "groups_psum_scatter": even(
        lambda n: (n // 2, 3),
        lambda on, n: lambda x: on.psum_scatter(x**2, "i", axis_index_groups=halves(n)),
    ),
    "groups_all_to_all": even(
        lambda n: (n // 2, 3),
        lambda on, n: lambda x: on.all_to_all(x**2, "i", 0, 0, axis_index_groups=halves(n)),
    ),
    "grad_inside": Case(
        of(3), lambda on, n: lambda x: on.grad(lambda y: on.psum(y**3, "i").sum())(x)
    ),
    "grad_of_pmean": Case(
        of(3), lambda on, n: lambda x: on.grad(lambda y: (on.pmean(y, "i") ** 2).sum())(x)
    ),
    "vmap_inside": Case(
        of(2, 3), lambda on, n: lambda x: on.vmap(lambda row: on.psum(row**2, "i") * row)(x)
    ),
    "vmap_of_gather": Case(
        of(2, 3), lambda on, n: lambda x: on.vmap(lambda row: on.all_gather(row, "i", axis=1))(x)
    ),
    "vmap_of_grad": Case(
        of(2, 3),
        lambda on, n: lambda x: on.vmap(on.grad(lambda y: (on.psum(y**2, "i") ** 2).sum()))(x),
    ),
    "jvp_inside": Case(
        of(3), lambda on, n: lambda x: on.jvp(lambda y: on.psum(y**3, "i") * y, (x,), (x * x,))[1]
    ),
    "jvp_of_permute": Case(
        of(3),
        lambda on, n: lambda x: on.jvp(lambda y: on.ppermute(y**3, "i", ring(n)), (x,), (x,))[1],
    ),
    "jacrev_inside": Case(
        of(3), lambda on, n: lambda x: on.jacrev(lambda y: on.psum(y**2, "i") * y)(x)
    ),
    "jacfwd_inside": Case(
        of(3), lambda on, n: lambda x: on.jacfwd(lambda y: on.all_gather(y**2, "i").sum(0))(x)
    ),
}

# Over the axes "i" and "j"; n is the number of all ranks.
SEVERAL = {
    "one_each": Case(of(3), lambda on, n: lambda x: on.psum(x, "i") * on.psum(x**2, "j")),
    "both": Case(of(3), lambda on, n: lambda x: x * on.psum(x**2, ("i", "j"))),
    "mean_of_both": Case(of(3), lambda on, n: lambda x: x * on.pmean(x**2, ("j", "i"))),
    "max_of_both": Case(
        of(3), lambda on, n: lambda x: on.pmax(x, ("i", "j")), differentiable=False
    ),
    "places": Case(
        of(1),
        lambda on, n: (
            lambda x: (
                x
                + on.axis_index("i")
                + 10 * on.axis_index("j")
                + 100 * on.axis_index(("i", "j"))
                + 10000 * on.axis_index(("j", "i"))
            )
        ),
    ),
    "gather": Case(of(2), lambda on, n: lambda x: on.all_gather(x**2, ("i", "j"))),
    "gather_turned": Case(of(2), lambda on, n: lambda x: on.all_gather(x**2, ("j", "i"), axis=1)),
    "gather_one": Case(of(2), lambda on, n: lambda x: on.all_gather(x**2, "i")),
    "scatter": Case(lambda n: (n, 2), lambda on, n: lambda x: on.psum_scatter(x**2, ("i", "j"))),
    "all_to_all": Case(
        lambda n: (n, 2), lambda on, n: lambda x: on.all_to_all(x**2, ("i", "j"), 0, 0, tiled=True)
    ),
    "permute": Case(of(2), lambda on, n: lambda x: on.ppermute(x**2, ("i", "j"), ring(n))),
    "grad_inside": Case(
        of(3), lambda on, n: lambda x: on.grad(lambda y: on.psum(y**3, ("i", "j")).sum())(x)
    ),
}
SHAPES = ((2, 4), (2, 3), (1, 2))

# The cases that quick tests compare, on 8 ranks.
QUICK = (
    "psum",
    "pmax",
    "all_gather_tiled",
    "psum_scatter",
    "all_to_all_tiled",
    "ppermute",
    "groups_psum",
    "vmap_of_grad",
)
QUICK_SEVERAL = ("both", "gather_turned", "grad_inside")


def inputs(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that are far from 0, and no two alike."""
    count = int(np.prod(shape))
    return (1.0 + np.random.default_rng(count).permutation(count) / count).reshape(shape)


def convolution(on: Any, normalized: bool) -> Callable[[Any, Any], Any]:
    def convolve(x, w):
        output = on.stack([on.dot(x[i - 1 : i + 2], w) for i in range(1, len(x) - 1)])
        return output / on.psum(output, "p") if normalized else output

    return convolve


def convolved(on: Any) -> list[Any]:
    xs, w = on.array(np.arange(5.0 * 8).reshape(-1, 5)), on.array(np.array([2.0, 3.0, 4.0]))
    stacked = on.pmap(convolution(on, False))(xs, on.stack([w] * 8))
    broadcast = on.pmap(convolution(on, False), in_axes=(0, None))(xs, w)
    both = (0, None)
    return [stacked, broadcast, on.pmap(convolution(on, True), axis_name="p", in_axes=both)(xs, w)]


def regression(on: Any) -> list[Any]:
    def update(weight, bias, xs, ys):
        def loss(params):
            return ((xs * params[0] + params[1] - ys) ** 2).mean()

        value, (by_weight, by_bias) = on.value_and_grad(loss)((weight, bias))
        by_weight, by_bias = on.pmean((by_weight, by_bias), "batch")
        return weight - 0.05 * by_weight, bias - 0.05 * by_bias, on.pmean(value, "batch")

    step = on.pmap(update, axis_name="batch", in_axes=(None, None, 0, 0), out_axes=None)
    xs = inputs((8, 16))
    ys = xs * 2 - 1 + 0.1 * np.sin(40 * xs)
    weight, bias = on.array(np.array(0.5)), on.array(np.array(0.0))
    for _ in range(5):
        weight, bias, loss = step(weight, bias, on.array(xs), on.array(ys))
    return [weight, bias, loss]


def axes(on: Any) -> list[Any]:
    x, y = on.array(inputs((2, 3, 4))), on.array(inputs((4, 2)))

    def f(x, tree, *, k):
        return {"x": x * tree["a"], "s": on.psum(x, "i")}, (k + tree["b"][0], tree["a"])

    mapped = on.pmap(
        f,
        axis_name="i",
        in_axes=(2, {"a": None, "b": (0, None)}),
        out_axes=({"x": 1, "s": None}, (1, None)),
    )
    out = mapped(x, {"a": on.array(np.array(3.0)), "b": (y, y)}, k=y)
    static = on.pmap(lambda x, n, y: x * n + y, static_broadcasted_argnums=1)(y, 3, y)
    dot = on.pmap(on.dot)(on.array(inputs((2, 3, 2))), on.array(inputs((2, 2, 3))))
    return [out[0]["x"], out[0]["s"], *out[1], static, dot]


EXAMPLES = {"convolution": convolved, "regression": regression, "axes": axes}
