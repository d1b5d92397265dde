"""Every collective, forward and backward, against all ranks in one process in lockstep."""

from __future__ import annotations

import pytest
import torch

import taskgrad as tg
from lockstep import Lockstep

RING = [(0, 1), (1, 2), (2, 3), (3, 0)]
PARTLY = [(0, 2), (3, 1)]

# A name, the shape that each rank has, and the function, written for any set of collectives.
CASES = {
    "psum": ((3,), lambda on: lambda x: on.psum(x.sin(), "i") * x),
    "psum_unused_on_some": (
        (3,),
        lambda on: lambda x: (x, on.psum(x * x, "i"))[on.axis_index("i") == 2],
    ),
    "psum_of_a_tree": (
        (3,),
        lambda on: lambda x: on.psum({"a": x, "b": x[0] * x}, "i")["b"],
    ),
    "two_psums_crossed": (
        (3,),
        lambda on: lambda x: (on.psum(x.exp(), "i"), on.psum(x * 2, "i"))[on.axis_index("i") % 2],
    ),
    "pmean": ((2, 3), lambda on: lambda x: (x - on.pmean(x, "i")) ** 2),
    "pmax": ((5,), lambda on: lambda x: on.pmax(x.round(), "i") * x),
    "pmin": ((5,), lambda on: lambda x: on.pmin(x.round(), "i") * x),
    "all_gather": ((2, 3), lambda on: lambda x: on.all_gather(x**2, "i")),
    "all_gather_axis": ((2, 3), lambda on: lambda x: on.all_gather(x**2, "i", axis=2)),
    "all_gather_last": ((2, 3), lambda on: lambda x: on.all_gather(x**2, "i", axis=-1)),
    "all_gather_tiled": (
        (2, 3),
        lambda on: lambda x: on.all_gather(x**2, "i", axis=1, tiled=True),
    ),
    "ppermute": ((3,), lambda on: lambda x: on.ppermute(x**2, "i", RING) * x),
    "ppermute_partly": ((3,), lambda on: lambda x: on.ppermute(x**2, "i", PARTLY) + x),
    "psum_scatter": ((4, 3), lambda on: lambda x: on.psum_scatter(x.sin(), "i")),
    "psum_scatter_tiled": (
        (3, 8),
        lambda on: lambda x: on.psum_scatter(x.sin(), "i", scatter_dimension=1, tiled=True),
    ),
    "all_to_all": ((4, 3), lambda on: lambda x: on.all_to_all(x.sin(), "i", 0, 1)),
    "all_to_all_same": ((2, 4), lambda on: lambda x: on.all_to_all(x.sin(), "i", 1, 1)),
    "all_to_all_tiled": (
        (8, 3),
        lambda on: lambda x: on.all_to_all(x.sin(), "i", 0, 1, tiled=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_lockstep(four, name):
    shape, write = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))

    out = tg.pmap(write(tg), axis_name="i", client=four)(ours)
    lockstep = Lockstep(4)
    expected = torch.stack(lockstep.run(write(lockstep), theirs))
    assert torch.equal(out, expected)

    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-13)


def test_a_large_psum_is_in_rank_order_and_equal_on_all_ranks(four):
    """Over a megabyte and more than two ranks: in two rounds."""
    x = torch.randn(4, 300_001)
    x[1] *= 1e6
    out = tg.pmap(lambda x: tg.psum(x, "i"), axis_name="i", client=four)(x)
    in_order = ((x[0] + x[1]) + x[2]) + x[3]
    assert not torch.equal(in_order, ((x[3] + x[2]) + x[1]) + x[0])
    for each in out:
        assert torch.equal(each, in_order)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool, torch.cfloat]
)
def test_dtypes(four, dtype):
    x = (torch.randn(4, 6) * 3).to(dtype)

    def f(x):
        return tg.psum(x, "i"), tg.all_gather(x, "i"), tg.ppermute(x, "i", RING)

    total, gathered, shifted = tg.pmap(f, axis_name="i", client=four)(x)
    if dtype is torch.bool:
        expected = x.long().sum(0)
    elif dtype in (torch.bfloat16, torch.float16):
        expected = x.float().sum(0).to(dtype)  # rounded once
    else:
        expected = ((x[0] + x[1]) + x[2]) + x[3]
    assert total.dtype is expected.dtype
    for rank in range(4):
        assert torch.equal(total[rank], expected)
        assert torch.equal(gathered[rank], x)
    assert torch.equal(shifted, x.roll(1, 0))


def test_bfloat16_gradients(four):
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    y = tg.pmap(lambda x: tg.psum(x, "i"), axis_name="i", client=four)(x)
    y.sum().backward()
    assert x.grad.dtype is torch.bfloat16
    assert torch.equal(x.grad, torch.full_like(x, 4))


def test_numbers_and_none_in_a_tree(four):
    def f(x):
        i = tg.axis_index("i")
        total = tg.psum({"one": 1, "i": i, "half": 0.5, "nothing": None}, "i")
        assert isinstance(total["one"], int)
        assert total["nothing"] is None
        return x, total["one"], total["i"], total["half"], tg.pmean(i, "i"), tg.axis_size("i")

    x, one, i, half, mean, size = tg.pmap(f, axis_name="i", client=four)(torch.zeros(4))
    assert one.tolist() == [4] * 4
    assert i.tolist() == [6] * 4
    assert half.tolist() == [2.0] * 4
    assert mean.tolist() == [1.5] * 4
    assert size.tolist() == [4] * 4


def test_gradients_taken_inside(four):
    """As a training step takes them; through collectives, and a second time through that."""
    x = torch.randn(4, 3, dtype=torch.float64)

    def write(on):
        def f(x):
            x = x.detach().requires_grad_()
            [g] = torch.autograd.grad(on.psum(x**3, "i").sum(), x, create_graph=True)
            [gg] = torch.autograd.grad((g * on.psum(g, "i")).sum(), x)
            return g.detach(), gg

        return f

    g, gg = tg.pmap(write(tg), axis_name="i", client=four)(x)
    # Inside, each rank differentiates the sum of all ranks' losses: psum's transpose is psum.
    y = x.clone().requires_grad_()
    total = 4 * (y**3).sum()
    [expected] = torch.autograd.grad(total, y, create_graph=True)
    torch.testing.assert_close(g, expected.detach())
    [twice] = torch.autograd.grad((expected * expected.sum(0)).sum(), y)
    torch.testing.assert_close(gg, twice)


def test_torch_func_inside(four):
    x = torch.randn(4, 3, dtype=torch.float64)

    def f(x):
        loss = lambda x: (tg.pmean(x, "i") ** 2).sum()  # noqa: E731
        g, value = torch.func.grad_and_value(loss)(x)
        return tg.psum(g, "i"), value

    g, value = tg.pmap(f, axis_name="i", client=four)(x)
    mean = x.mean(0)
    torch.testing.assert_close(value, (mean**2).sum().expand(4))
    torch.testing.assert_close(g, (2 * mean * 4).expand(4, 3))


def test_what_cannot_be_given(four):
    def message(fn, x):
        with pytest.raises(tg.LayerError) as caught:
            tg.pmap(fn, axis_name="i", client=four)(x)
        return str(caught.value)

    x = torch.ones(4, 3)
    assert "does not divide" in message(lambda x: tg.psum_scatter(x, "i", tiled=True), x)
    assert "axis size, 4" in message(lambda x: tg.all_to_all(x, "i", 0, 0), x)
    assert "no axis" in message(lambda x: tg.all_gather(x, "i", axis=2), x)
    assert "twice" in message(lambda x: tg.ppermute(x, "i", [(0, 1), (2, 1)]), x)
    assert "dense tensors and numbers; got a str" in message(lambda x: tg.psum("x", "i"), x)
    groups = [[0, 1], [2]]
    assert "places on the axis" in message(lambda x: tg.psum(x, "i", axis_index_groups=groups), x)
    uneven = [[0, 1, 2], [3]]
    text = message(lambda x: tg.all_gather(x, "i", axis_index_groups=uneven), x)
    assert "differ in length" in text
    assert "unbound axis name: 'j'" in message(lambda x: tg.psum(x, ("i", "j")), x)
    assert "named twice" in message(lambda x: tg.psum(x, ("i", "i")), x)


def test_unbound_axis_names(four):
    with pytest.raises(NameError, match="unbound axis name: 'i'"):
        tg.psum(torch.ones(2), "i")
    for name in ("j", None):
        with pytest.raises(tg.LayerError, match="unbound axis name: 'i'") as caught:
            tg.pmap(lambda x: tg.psum(x, "i"), axis_name=name, client=four)(torch.ones(2))
        assert isinstance(caught.value.__cause__, NameError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_short_floats_is_torchs(client, dtype):
    """Their sum overflows; torch.mean adds up in float32."""
    x = torch.tensor([[60000.0, 1.1], [50000.0, 2.3]], dtype=dtype)
    mean = tg.pmap(lambda row: tg.pmean(row, "i"), axis_name="i")(x)
    assert torch.equal(mean, x.mean(0).expand(2, 2))
    assert mean.dtype == dtype
