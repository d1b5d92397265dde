"""Collectives inside the transforms of torch.func, and gradcheck of each of them."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import taskgrad as tg
from helpers import long

X = torch.randn(4, 3, 2, dtype=torch.float64)
SUM, CUBES = X.sum(0), (X**3).sum(0)
LARGEST = (X.amax(0) == X).double()

# A function of each rank's part of X, and what all ranks give.
CASES = {
    "vmap": (lambda x: vmap(lambda r: tg.psum(r, "i") * r)(x), SUM * X),
    "vmap_of_axis_1": (
        lambda x: vmap(lambda r: tg.all_gather(r, "i"), in_dims=1)(x),
        X.permute(2, 0, 1).expand(4, 2, 4, 3),
    ),
    "vmap_of_an_axis_from_the_end": (
        lambda x: vmap(lambda r: tg.all_gather(r, "i", axis=-1))(x),
        X.permute(1, 2, 0).expand(4, 3, 2, 4),
    ),
    "vmap_of_vmap": (
        lambda x: vmap(vmap(lambda r: tg.all_gather(r, "i")))(x),
        X.permute(1, 2, 0).expand(4, 3, 2, 4),
    ),
    "vmap_of_pmax": (lambda x: vmap(lambda r: tg.pmax(r, "i"))(x), X.amax(0).expand_as(X)),
    "vmap_of_whole_numbers": (
        lambda x: vmap(lambda r: tg.psum((r * 9).long(), "i"))(x),
        (X * 9).long().sum(0).expand(4, 3, 2),
    ),
    "vmap_of_a_tree": (
        lambda x: vmap(lambda r: tg.psum({"r": r, "n": 1, "one": torch.ones(2)}, "i")["r"])(x),
        SUM.expand_as(X),
    ),
    "vmap_of_scatter": (
        lambda x: vmap(lambda r: tg.psum_scatter(r.expand(4, 2), "i"))(x),
        SUM.expand_as(X),
    ),
    "vmap_of_all_to_all": (
        lambda x: vmap(lambda r: tg.all_to_all(r.expand(4, 2), "i", 0, 1))(x),
        X.permute(1, 2, 0).expand(4, 3, 2, 4),
    ),
    "vmap_of_broadcast": (lambda x: vmap(lambda r: tg.pbroadcast(r, "i", 2))(x), X[2].expand_as(X)),
    "grad": (lambda x: grad(lambda y: tg.psum(y**3, "i").sum())(x), 12 * X**2),
    "grad_of_pmax": (lambda x: grad(lambda y: tg.pmax(y, "i").sum())(x), 4 * LARGEST),
    "grad_of_grad": (
        lambda x: grad(lambda z: grad(lambda y: tg.psum(y**3, "i").sum())(z).sum())(x),
        24 * X,
    ),
    "grad_with_whole_numbers": (
        lambda x: grad(lambda y: tg.psum((y**2, (y > 0).long()), "i")[0].sum())(x),
        8 * X,
    ),
    "vmap_of_grad": (
        lambda x: vmap(grad(lambda y: (tg.psum(y**3, "i") ** 2).sum()))(x),
        24 * CUBES * X**2,
    ),
    "vmap_of_grad_of_pmax": (
        lambda x: vmap(grad(lambda y: tg.pmax(y, "i").sum()))(x),
        4 * LARGEST,
    ),
    "vjp": (lambda x: vjp(lambda y: tg.all_gather(y, "i"), x)[1](X)[0], 4 * X),
    "jvp": (
        lambda x: jvp(lambda y: tg.psum(y**3, "i") * y, (x,), (x,))[1],
        3 * CUBES * X + CUBES * X,
    ),
    "jvp_of_pmax": (
        lambda x: jvp(lambda y: tg.pmax(y, "i"), (x,), (x * x,))[1],
        (LARGEST * X**2).sum(0).expand_as(X),
    ),
    "jvp_of_one_of_two": (
        lambda x: jvp(lambda y: tg.psum((y, x), "i")[0] * 2, (x,), (x * x,))[1],
        2 * (X**2).sum(0).expand_as(X),
    ),
    "jacrev": (lambda x: jacrev(lambda y: tg.psum(y**2, "i").sum())(x), 8 * X),
    # Each rank's tangents at once: the sum of the ranks' derivatives.
    "jacfwd": (lambda x: jacfwd(lambda y: tg.psum(y**2, "i").sum())(x), 2 * SUM.expand_as(X)),
    "hessian": (
        lambda x: hessian(lambda y: tg.psum(y**3, "i").sum())(x[0, 0]),
        24 * X[:, 0, 0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transforms_inside(client, name):
    """Four ranks on two workers."""
    f, expected = CASES[name]
    torch.testing.assert_close(tg.pmap(f, "i", client=client)(X), expected)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_value_beside_one_that_is_transformed(client, ranks):
    """With one rank a worker, and with two."""

    def f(x):
        return jvp(lambda y: tg.psum((y, x, x > 0), "i")[:2], (x,), (x * x,))

    x = torch.randn(ranks, 3)
    values, tangents = tg.pmap(f, "i", client=client)(x)
    torch.testing.assert_close(values[1][0], x.sum(0))
    torch.testing.assert_close(tangents[0][0], (x**2).sum(0))
    assert torch.equal(tangents[1], torch.zeros(ranks, 3))


def test_a_backward_on_the_driver_through_a_transform(client):
    """One rank does not use what it gets; its backward has to come to the collective as well."""

    def f(x):
        y = vmap(lambda r: tg.psum(r.sin(), "i") * r)(x)
        z = grad(lambda y: tg.psum(y**3, "i").sum())(x)
        return x * 1 if tg.axis_index("i") == 2 else y + z

    x, y = (X.clone().requires_grad_() for _ in range(2))
    out = tg.pmap(f, "i", client=client)(x)
    expected = y.sin().sum(0) * y + 12 * y**2
    expected = torch.stack([y[i] if i == 2 else expected[i] for i in range(4)])
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


PAIRS = [(0, 1), (1, 2), (2, 0)]
GROUPS = [[0, 2], [1]]
COLLECTIVES = {
    "psum": lambda x: tg.psum(x.sin(), "i"),
    "psum_of_groups": lambda x: tg.psum(x.sin(), "i", axis_index_groups=GROUPS) * x,
    "pmean": lambda x: tg.pmean(x.sin(), "i") * x,
    "pmean_of_groups": lambda x: tg.pmean(x.sin(), "i", axis_index_groups=GROUPS),
    "pmax": lambda x: tg.pmax(x.sin(), "i"),
    "pmin": lambda x: tg.pmin(x.sin(), "i") * x,
    "all_gather": lambda x: tg.all_gather(x.sin(), "i", axis=1),
    "all_gather_tiled": lambda x: tg.all_gather(x.sin(), "i", axis=1, tiled=True),
    "psum_scatter": lambda x: tg.psum_scatter(x.sin(), "i"),
    "psum_scatter_tiled": lambda x: tg.psum_scatter(x.sin(), "i", tiled=True),
    "all_to_all": lambda x: tg.all_to_all(x.sin(), "i", 0, 1),
    "all_to_all_tiled": lambda x: tg.all_to_all(x.sin(), "i", 0, 1, tiled=True),
    "ppermute": lambda x: tg.ppermute(x.sin(), "i", PAIRS[:2]) * x,
    "pshuffle": lambda x: tg.pshuffle(x.sin(), "i", [2, 0, 1]),
    "pswapaxes": lambda x: tg.pswapaxes(x.sin(), "i", 0),
    "pbroadcast": lambda x: tg.pbroadcast(x.sin(), "i", 1) * x,
}


@pytest.mark.parametrize("fast", [True, *long(False)])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_gradcheck(client, name, fast):
    """Three ranks on two workers."""
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    f = tg.pmap(COLLECTIVES[name], "i", client=client)
    assert torch.autograd.gradcheck(f, (x,), fast_mode=fast)
