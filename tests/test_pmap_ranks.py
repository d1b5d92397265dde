"""pmap with more ranks than workers, and the options that say what each rank gets."""

from __future__ import annotations

import functools
import os
import threading

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from taskgrad.cluster.tasks import mailboxes


def empty(client) -> bool:
    """Whether no worker holds anything of ours, mailboxes included."""
    counts = [*client.run(mailboxes).values(), total_held(client)]
    return not any(value for count in counts for value in count.values())


def test_ranks_are_spread_over_workers_neighbours_together(four):
    def where(x):
        return tg.psum(x, "i"), os.getpid()

    for n in (8, 6, 4, 3):
        total, pids = tg.pmap(where, "i", client=four)(torch.ones(n))
        assert total.tolist() == [n] * n
        runs = [pid for i, pid in enumerate(pids.tolist()) if i == 0 or pids[i - 1] != pid]
        assert len(runs) == len(set(runs)) == min(n, 4)
        counts = [pids.tolist().count(pid) for pid in runs]
        assert max(counts) - min(counts) <= 1


def results(client, x):
    """Of sums whose order shows in their bits, of random numbers, and of gradients."""
    torch.manual_seed(7)
    scale = torch.full((5,), 1.1, requires_grad=True)

    def f(x):
        y = tg.psum(x.sin() * scale, "i") * x + tg.pmean(torch.rand(5), "i")
        z = tg.psum_scatter(y.expand(8, 5) * x, "i")
        return y + tg.all_gather(z, "i").sum(0)

    leaf = x.clone().requires_grad_()
    y = tg.pmap(f, "i", client=client)(leaf)
    y.sum().backward()
    return y.detach(), leaf.grad, scale.grad


def test_the_same_bits_on_any_workers_and_after_they_join_or_leave(fresh):
    """Eight ranks on workers of one thread, at first on one; and three maps at once."""
    client = fresh(n_workers=1)
    x = torch.randn(8, 5) * torch.logspace(0, 6, 8)[:, None]
    first = results(client, x)
    for workers in (3, 4, 2):
        client.cluster.scale(workers)
        assert wait_until(lambda: len(client.nthreads()) == workers)  # noqa: B023
        for ours, theirs in zip(results(client, x), first, strict=True):
            assert torch.equal(ours, theirs)
    client.cluster.scale(1)
    assert wait_until(lambda: len(client.nthreads()) == 1)
    found = []
    f = tg.pmap(lambda x: tg.psum(tg.psum(x, "i") * x, "i"), "i", client=client)
    threads = [threading.Thread(target=lambda: found.append(f(x))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = f(x)
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    assert wait_until(lambda: empty(client))


def test_an_error_among_many_ranks_ends_all(client):
    def f(x):
        x = tg.psum(x, "i")
        if tg.axis_index("i") == 5:
            raise KeyError("boo")
        return tg.psum(x, "i")

    with pytest.raises(tg.LayerError, match="rank 5 of f") as caught:
        tg.pmap(f, "i", client=client)(torch.ones(7))
    assert isinstance(caught.value.__cause__, KeyError)
    caught.value.__traceback__ = None
    assert wait_until(lambda: empty(client))


def test_static_arguments(client):
    x = torch.ones(2, 3)
    layer = nn.Linear(3, 2)

    def f(x, how, fn, k):
        return fn(x) * how["scale"] + k[0].sum()

    # As None in in_axes, whatever in_axes says of them.
    for in_axes in (0, (0, 0, 0, 0)):
        mapped = tg.pmap(f, in_axes=in_axes, static_broadcasted_argnums=(1, 2), client=client)
        y = mapped(x, {"scale": 2.0, "name": "of no tensor"}, layer, (x,))
        torch.testing.assert_close(y, layer(x) * 2 + 3)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="there are 1 positional arguments"):
        tg.pmap(torch.add, static_broadcasted_argnums=1, client=client)(x)
    with pytest.raises(ValueError, match="positions from 0 on"):
        tg.pmap(torch.add, static_broadcasted_argnums=-1)
    with pytest.raises(TypeError, match="static_broadcasted_argnums is a whole number"):
        tg.pmap(torch.add, static_broadcasted_argnums=("x",))


def test_the_length_of_an_axis_that_no_argument_has(client):
    f = tg.pmap(lambda x: x * tg.axis_index("i"), "i", in_axes=None, axis_size=3, client=client)
    assert f(torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert tg.pmap(lambda: torch.tensor(1), axis_size=2, client=client)().tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"inconsistent sizes.*3 \(axis_size\), 2 \(float32\[2\]"):
        tg.pmap(torch.sin, axis_size=3, client=client)(torch.ones(2))
    with pytest.raises(ValueError, match="axis_size"):
        tg.pmap(torch.sin, axis_size=0)


def test_none_is_nothing_to_map(client):
    def f(x, bias, *, mask=None):
        return x if bias is None and mask is None else None

    x = torch.ones(2)
    assert torch.equal(tg.pmap(f, client=client)(x, None), x)
    assert torch.equal(tg.pmap(f, in_axes=(0, {"b": 0}), client=client)(x, {"b": None}) or x, x)
    assert tg.pmap(f, client=client)(x, x, mask=None) is None


def test_prefixes_of_lists_dictionaries_and_named_axes(client):
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3.0)

    def f(tree, rest):
        return [tree["a"] + rest[1], {"total": tree["b"][0].sum()}]

    mapped = tg.pmap(
        f, in_axes=[{"a": 1, "b": None}, [None, None]], out_axes=[1, None], client=client
    )
    first, second = mapped({"a": x, "b": [y]}, ["a word", y])
    assert torch.equal(first, x + y[:, None])
    assert second == {"total": torch.tensor(3.0)}
    with pytest.raises(ValueError, match="not a prefix"):
        tg.pmap(f, in_axes=(0, {"a": 0}), client=client)({"a": x, "b": [y]}, [y, y])


def test_as_a_decorator(client):
    @tg.pmap
    def double(x):
        """Twice x."""
        return 2 * x

    @functools.partial(tg.pmap, axis_name="i", out_axes=None)
    def total(x):
        return tg.psum(x, "i")

    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert (double.__name__, double.__doc__) == ("double", "Twice x.")
    assert total(torch.ones(3)) == 3
    with pytest.raises(TypeError, match="donate_argnums"):
        tg.pmap(double, donate_argnums=0)
