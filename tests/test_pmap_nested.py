"""Maps in maps: several axes, composed or called in a rank; beside plain torch."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from taskgrad.cluster.tasks import mailboxes

X = torch.randn(2, 3, 4, dtype=torch.float64)


def empty(client) -> bool:
    """Whether no worker holds anything of ours, mailboxes included."""
    client.run(gc.collect)
    counts = [*client.run(mailboxes).values(), total_held(client)]
    return not any(value for count in counts for value in count.values())


def composed(fn, client):
    return tg.pmap(tg.pmap(fn, "j"), "i", client=client)


def called(fn, client):
    return tg.pmap(lambda x: tg.pmap(fn, "j")(x), "i", client=client)


@pytest.mark.parametrize("nest", [composed, called])
def test_sums_over_each_axis_and_their_gradients(client, nest):
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x):
        a, b = tg.psum(x.sin() * w, "j"), tg.psum(x * x, "i")
        return a * b + tg.psum(x**3, ("i", "j")) * x * tg.axis_index(("j", "i"))

    x, y = (X.clone().requires_grad_() for _ in range(2))
    out = nest(f, client)(x)
    places = torch.arange(6.0).reshape(3, 2).T[:, :, None]
    sums = (y.sin() * w).sum(1, keepdim=True) * (y * y).sum(0)
    expected = sums + (y**3).sum((0, 1)) * y * places
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(X)
    found = torch.autograd.grad(out, [x, w], cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [y, w], cotangent))
    assert wait_until(lambda: empty(client))


def test_a_map_in_the_middle_of_a_rank(client):
    """Its inputs are part of the rank's graph, and so are its results; it closes over a sum."""

    def f(x):
        z = tg.psum(x.exp(), "i")
        y = tg.pmap(lambda row: tg.psum(row * z.sum(), ("j", "i")) + row, "j")(x * z)
        return tg.psum(y, "i") * y

    x, y = (X.clone().requires_grad_() for _ in range(2))
    out = tg.pmap(f, "i", client=client)(x)
    z = y.exp().sum(0)
    inner = (y * z * z.sum()).sum((0, 1)) + y * z
    expected = inner.sum(0) * inner
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_three_levels(client):
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64)

    def inner(x):
        return x * tg.psum(x, ("i", "k")) + tg.axis_index(("i", "j", "k"))

    expected = x * x.sum((0, 2), keepdim=True) + torch.arange(8.0).reshape(2, 2, 2, 1)
    for f in (
        tg.pmap(tg.pmap(tg.pmap(inner, "k"), "j"), "i"),
        tg.pmap(lambda x: tg.pmap(lambda x: tg.pmap(inner, "k")(x), "j")(x), "i"),
        tg.pmap(lambda x: tg.pmap(tg.pmap(inner, "k"), "j")(x), "i"),
    ):
        torch.testing.assert_close(f(x), expected)


def test_axes_of_each_level(client):
    w = torch.randn(3, dtype=torch.float64)
    f = tg.pmap(
        tg.pmap(lambda x, w, n: (x * w, w, n), "j", in_axes=(1, 0, None), out_axes=(1, 0, None)),
        "i",
        in_axes=(2, None, None),
        out_axes=(0, None, None),
        client=client,
    )
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    out, same, n = f(x, w, 5)
    torch.testing.assert_close(out, (x * w[:, None]).permute(2, 0, 1))
    assert torch.equal(same, w)
    assert n == 5


def test_gradients_taken_in_a_rank_through_a_map_in_it(client):
    def f(x):
        x = x.detach().requires_grad_()
        y = tg.pmap(lambda row: tg.psum(row**3, ("i", "j")), "j")(x)
        [first] = torch.autograd.grad(y.sum(), x, retain_graph=True)
        [second] = torch.autograd.grad(y.sum(), x)
        return first, second

    first, second = tg.pmap(f, "i", client=client)(X)
    torch.testing.assert_close(first, 6 * 3 * X**2)  # the sum of all six ranks' losses
    assert torch.equal(first, second)


def test_a_part_of_the_ranks_that_is_not_used(client):
    """One rank drops what its map gives; all have to come to the collectives of its backward."""

    def f(x):
        y = tg.pmap(lambda row: tg.psum(row * row, ("i", "j")), "j")(x)
        return y.sum() if tg.axis_index("i") == 0 else x.sum()

    x = X.clone().requires_grad_()
    tg.pmap(f, "i", client=client)(x).sum().backward()
    expected = 3 * 2 * X
    expected[1] += 1
    torch.testing.assert_close(x.grad, expected)


def test_random_numbers_of_each_rank(client):
    f = called(lambda x: torch.rand(2), client)
    torch.manual_seed(0)
    first = f(X)
    torch.manual_seed(0)
    assert torch.equal(f(X), first)
    assert first.unique().numel() == first.numel()


def test_buffers_that_a_module_changes_in_a_map_in_a_rank(client):
    norm = nn.BatchNorm1d(4)
    x = torch.randn(2, 3, 5, 4)

    def f(x):
        y = tg.pmap(norm, "j")(x)
        return y, norm.running_mean.clone()

    _, means = tg.pmap(f, "i", client=client)(x)
    plain = nn.BatchNorm1d(4)
    plain(x[1, 0])
    torch.testing.assert_close(means[1], plain.running_mean)


def test_an_error_in_a_map_in_a_rank_ends_all(client):
    def f(x):
        x = tg.psum(x, ("i", "j"))
        if tg.axis_index(("i", "j")) == 4:
            raise KeyError("boo")
        return tg.psum(x, ("i", "j"))

    with pytest.raises(tg.LayerError, match=r"rank 4 \(i=1, j=1\) of f") as caught:
        called(f, client)(X)
    assert isinstance(caught.value.__cause__, KeyError)
    caught.value.__traceback__ = None

    def g(x):
        if tg.axis_index("i") == 0:
            raise KeyError("boo")
        return tg.pmap(lambda row: tg.psum(row, ("i", "j")), "j")(x)

    with pytest.raises(tg.LayerError, match="rank 0 of g") as caught:
        tg.pmap(g, "i", client=client)(X)
    caught.value.__traceback__ = None

    def different(x):
        if tg.axis_index("i") == 0:
            return tg.psum(x, ("i", "j"))
        return tg.pmax(x, ("i", "j"))

    text = r"rank 0 calls psum\(float64\[4\]\) over 'i', 'j'; .*rank 3 calls pmax"
    with pytest.raises(tg.CollectiveError, match=text) as caught:
        called(different, client)(X)
    caught.value.__traceback__ = None
    assert wait_until(lambda: empty(client))


def test_one_returns_before_its_map(client):
    """The ranks of the others' maps wait for ranks that are never started."""

    def f(x):
        if tg.axis_index("i") == 0:
            return x
        return tg.pmap(lambda row: tg.psum(row, ("i", "j")), "j")(x)

    with pytest.raises(tg.CollectiveError, match="different numbers of collectives"):
        tg.pmap(f, "i", client=client)(X)


def test_what_is_refused(client):
    with pytest.raises(ValueError, match="have the axis name 'i'"):
        tg.pmap(tg.pmap(torch.sin, "i"), "i")

    def message(fn):
        with pytest.raises(tg.LayerError) as caught:
            tg.pmap(fn, "i", client=client)(X)
        return str(caught.value)

    assert "have the axis name 'i'" in message(lambda x: tg.pmap(torch.sin, "i")(x))
    text = message(lambda x: torch.func.vmap(lambda y: tg.pmap(torch.sin)(y))(x[None]))
    assert "inside a transform of torch.func" in text
    assert "unbound axis name: 'k' (the axes here are 'i', 'j')" in message(
        lambda x: tg.pmap(lambda row: tg.psum(row, "k"), "j")(x)
    )
    assert "groups of one axis" in message(
        lambda x: tg.psum(x, ("i",), axis_index_groups=[[0], [1]])
    )
