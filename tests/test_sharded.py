"""Sharded tensors: what is computed where the parts are, against plain torch."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import taskgrad as tg
from conftest import about_workers, total_held, wait_until
from helpers import known_to_scheduler, long

DTYPES = [torch.float32, torch.bfloat16, *long(torch.float64, torch.int64, torch.complex64)]
WORKERS = [[0, 1], *long([0], [2, 0, 1])]
AXES = [0, *long(1, -1, None)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(*shape) * 3
    return made > 0 if dtype is torch.bool else made.to(dtype)


def same(ours: tg.ShardedTensor, theirs: torch.Tensor) -> None:
    assert isinstance(ours, tg.ShardedTensor)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    found = ours.gather()
    assert found.dtype == theirs.dtype
    assert torch.equal(found, theirs)


def holders(x: tg.ShardedTensor) -> list[tuple[object, int, int]]:
    return [(part.worker.name, part.start, part.stop) for part in x.parts]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_put_on_workers_and_comes_back(client, dtype):
    t = values(7, 3, dtype=dtype)
    x = tg.shard(t, client=client)
    same(x, t)
    assert x.layout == tg.Sharded(0)
    assert holders(x) == [(0, 0, 4), (1, 4, 7)]
    assert (x.ndim, x.dim(), x.numel(), len(x), x.size(1)) == (2, 2, 21, 7, 3)
    assert x.nbytes == t.nbytes
    assert x.device == t.device
    assert not x.requires_grad
    t.zero_()
    assert not torch.equal(x.gather(), t)


def test_layouts(four):
    t = values(6, 5)
    assert holders(tg.shard(t, client=four)) == [(0, 0, 2), (1, 2, 3), (2, 3, 5), (3, 5, 6)]
    assert holders(tg.shard(t, 1, workers=[3, 1], client=four)) == [(3, 0, 3), (1, 3, 5)]
    copies = tg.shard(t, None, workers=[2, 0], client=four)
    assert holders(copies) == [(2, 0, 0), (0, 0, 0)]
    assert copies.layout == tg.Sharded(None)
    assert holders(tg.shard(t[:2], client=four)) == [(0, 0, 1), (1, 1, 2)]
    empty = tg.shard(t[:0], client=four)
    assert holders(empty) == [(0, 0, 0)]
    same(empty, t[:0])
    same(tg.shard(torch.tensor(3.0), None, client=four), torch.tensor(3.0))
    x = tg.shard(t, client=four)
    assert x.reshard(0).parts == x.parts
    same(empty.reshard(1), t[:0])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("workers", [[1, 2], *long(None, [3])])
def test_resharding(four, axis, workers):
    t = values(6, 5)
    for other in (1, None, 0):
        x = tg.shard(t, axis, client=four).reshard(other, workers=workers)
        same(x, t)
        assert x.layout == tg.Sharded(other)
        assert len(x.parts) == len(workers or range(4))
        same(x[1:5].reshard(0), t[1:5])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("workers", WORKERS)
def test_elementwise_functions_have_torchs_bits(four, workers, axis):
    t, u = values(5, 4), values(5, 4)
    x = tg.shard(t, axis, workers=workers, client=four)
    y = tg.shard(u, axis, workers=workers, client=four)
    row, column = values(4), values(5, 1)
    same(x + y, t + u)
    same(2 - x * row, 2 - t * row)
    same(column / x, column / t)
    same(x / column + 1j, t / column + 1j)
    same(-(x**2), -(t**2))
    torch.testing.assert_close((2**x).gather(), 2**t)  # torch rounds the end of a row otherwise
    same(x // 0.5 % 3, t // 0.5 % 3)
    same(abs(x) >= y, abs(t) >= u)
    same((x > 0) & ~(y > 0) | (x == y), (t > 0) & ~(u > 0) | (t == u))
    same(row != x, row != t)
    same(torch.where(x > 0, y, 0.0), torch.where(t > 0, u, 0.0))
    same(torch.lerp(x, y, 0.25), torch.lerp(t, u, 0.25))
    same(torch.clamp(x, max=row.abs()), torch.clamp(t, max=row.abs()))
    same(x.exp().double(), t.exp().double())
    same(F.gelu(x, approximate="tanh"), F.gelu(t, approximate="tanh"))
    same(torch.special.expit(x), torch.special.expit(t))
    same(F.threshold(x, 0.5, -1.0), F.threshold(t, 0.5, -1.0))
    torch.testing.assert_close(F.logsigmoid(x).gather(), F.logsigmoid(t))
    same(x.map(lambda part: part.abs() * 3), t.abs() * 3)
    if axis in (1, -1):
        same(x[:, None] * y, t[:, None] * u)
    assert holders(x + y) == holders(x)


def test_copies_beside_parts(four):
    t, row = values(4, 3), values(3)
    x = tg.shard(t, client=four)
    same(x + tg.shard(row, None, client=four), t + row)
    same(tg.shard(t, None, client=four) * x, t * t)
    same(tg.shard(values(2, 4, 3), None, client=four) * 0 + x, t.expand(2, 4, 3))
    assert (tg.shard(values(2, 4, 3), None, client=four) + x).layout == tg.Sharded(1)


INDICES = [
    *(0, -1, slice(1, 6, 2), slice(5, 5), slice(None), (slice(None), 1), (3, 2)),
    *(None, (None, slice(2, 3)), (..., 0), (slice(1, 4), None, slice(0, 2)), (slice(6, None), 0)),
]


@pytest.mark.parametrize("axis", AXES)
def test_indexing(four, axis):
    t = values(7, 3)
    x = tg.shard(t, axis, workers=[0, 1, 2], client=four)
    for index in INDICES:
        same(x[index], t[index])
    same(x[1:][::2] * 2, t[1:][::2] * 2)
    assert [float(row.sum()) for row in x] == [float(row.sum()) for row in t]
    if axis == 0:
        assert holders(x[2:]) == [(0, 0, 1), (1, 1, 3), (2, 3, 5)]
        assert x[:, 0].layout == tg.Sharded(0)
        assert holders(x[:, 0]) == holders(x)
        assert holders(x[3]) == [(1, 0, 0)]


def test_reductions_stay_or_give_a_tensor(four):
    t = values(7, 4, 3)
    x = tg.shard(t, client=four)
    for name in ("sum", "mean", "amax", "amin"):  # beside axis 0, to the bits
        ours, theirs = getattr(x, name), getattr(torch, name)
        for dim in (1, -1, (1, 2)):
            same(ours(dim), theirs(t, dim))
            same(ours(dim, keepdim=True), theirs(t, dim, keepdim=True))
        for dim in (0, (0, 2), (0, 1, 2)):
            torch.testing.assert_close(ours(dim), theirs(t, dim), rtol=1e-5, atol=1e-5)
            assert ours(dim, True).shape == theirs(t, dim, True).shape
    assert torch.equal(x.max(), t.max())
    assert torch.equal(torch.amin(x), t.amin())
    torch.testing.assert_close(x.sum(), t.sum())
    torch.testing.assert_close(torch.mean(x, dim=0), t.mean(0))
    same((x > 0).all(2), (t > 0).all(2))
    assert torch.equal((x > 0).any(), (t > 0).any())
    assert torch.equal((x > 0).all(0), (t > 0).all(0))
    for p in (2, 1, 0, 3, float("inf"), -float("inf")):
        torch.testing.assert_close(x.norm(p), torch.linalg.vector_norm(t, p))
        torch.testing.assert_close(x.norm(p, 0), torch.linalg.vector_norm(t, p, 0))
    torch.testing.assert_close(tg.shard(t, 1, client=four).mean(0).gather(), t.mean(0))
    copies = tg.shard(t, None, client=four)
    same(copies.sum(0), t.sum(0))
    assert torch.equal(copies.mean(), t.mean())


def test_sums_over_the_parts_are_in_their_order(four):
    """Two parts of one number each: no other order gives these bits."""
    t = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert tg.shard(t, client=four).sum() == ((t[0] + t[1]) + t[2]) + t[3]
    short = torch.full((4, 1000), 1.0, dtype=torch.bfloat16)
    assert tg.shard(short, client=four).sum() == 4000
    assert tg.shard(short, client=four).sum().dtype is torch.bfloat16
    counts = torch.tensor([True, True, False])
    assert tg.shard(counts, client=four).sum() == 2
    assert tg.shard(counts, client=four).sum().dtype is torch.int64
    assert tg.shard(torch.tensor([250, 250], dtype=torch.uint8), client=four).sum() == 500


def test_one_number_and_what_is_more(client):
    x = tg.shard(torch.tensor([2.0, 3.0]), client=client)
    assert x[1].item() == 3
    assert (int(x[0]), float(x[1]), bool(x[0] > 1)) == (2, 3.0, True)
    for use in (x.item, lambda: bool(x), lambda: float(x)):
        with pytest.raises(RuntimeError, match="2 elements"):
            use()
    with pytest.raises(TypeError, match="without dimensions"):
        len(x[0])


def test_copies_and_pickles(client):
    x = tg.shard(torch.arange(4.0), client=client)
    assert copy.copy(x) is x
    same(copy.deepcopy({"x": x})["x"], torch.arange(4.0))
    assert {x: 1}[x] == 1
    with pytest.raises(TypeError, match=r"cannot be pickled.*as an argument"):
        pickle.dumps(x)
    with pytest.raises(TypeError, match="cannot be pickled"):
        tg.spawn(torch.exp, x)


def test_parts_go_with_the_sharded_tensor(client):
    before = known_to_scheduler(client)
    x = tg.shard(torch.ones(4), client=client)
    y = x + 1
    assert total_held(client)["parts"] == 4
    del x
    assert wait_until(lambda: total_held(client)["parts"] == 2)
    same(y, torch.full((4,), 2.0))
    for _ in range(5):
        y = y * 2
    assert wait_until(lambda: total_held(client)["parts"] == 2)
    # The scheduler keeps nothing of what went before either.
    assert len(known_to_scheduler(client) - before) == 2
    del y
    gc.collect()
    assert wait_until(lambda: total_held(client)["parts"] == 0)


def test_the_dashboard_shows_the_bytes_of_parts(client):
    x = tg.shard(torch.zeros(6, 1000), client=client)

    def shown() -> list[int]:
        return [w["metrics"]["taskgrad_parts"] for w in about_workers(client).values()]

    half = x.nbytes // 2
    assert wait_until(lambda: shown() == [half, half])
    del x
    assert wait_until(lambda: shown() == [0, 0])


def test_what_is_refused(four):
    t = torch.arange(12.0).reshape(4, 3)
    x = tg.shard(t, client=four)

    def refused(kind, text, use):
        with pytest.raises(kind, match=text):
            use()

    refused(TypeError, "takes a tensor.*as_tensor", lambda: tg.shard([1, 2], client=four))
    refused(TypeError, "dense tensor", lambda: tg.shard(t.to_sparse(), client=four))
    refused(TypeError, "dense tensor", lambda: tg.shard(t.to("meta"), client=four))
    refused(ValueError, "no axis 2 to cut", lambda: tg.shard(t, 2, client=four))
    refused(ValueError, "no axis 0 to cut", lambda: tg.shard(t.sum(), client=four))
    refused(TypeError, "axis is a whole number", lambda: tg.shard(t, "0", client=four))
    refused(TypeError, "Sharded is a whole number", lambda: tg.Sharded(0.5))
    refused(ValueError, "each worker once", lambda: x.reshard(workers=[0, 0]))
    refused(TypeError, "list of indices", lambda: x.reshard(workers="0"))
    refused(tg.PlacementError, "no worker 9", lambda: x.reshard(workers=[9]))
    refused(TypeError, "as an index.*gather", lambda: x[[0, 1]])
    refused(TypeError, "as an index", lambda: x[torch.tensor([True, False, True, True])])
    refused(TypeError, "as an index", lambda: x[True])
    refused(IndexError, "out of (range|bounds)", lambda: x[4])
    refused(IndexError, "too many indices", lambda: x[0, 0, 0])
    refused(IndexError, "one ellipsis", lambda: x[..., ...])
    refused(TypeError, "cannot be written", lambda: x.__setitem__(0, 1))
    refused(AttributeError, "no attribute 'cumsum'", lambda: x.cumsum)
    refused(AttributeError, "no attribute 'add_'", lambda: x.add_)
    refused(TypeError, "matmul of a sharded tensor.*tg.pmap", lambda: torch.matmul(x, t.T))
    refused(TypeError, "add_ of a sharded tensor", lambda: t.add_(x))
    refused(TypeError, "cannot write", lambda: torch.add(x, 1, out=t))
    refused(TypeError, "cannot write", lambda: F.relu(x, inplace=True))
    refused(TypeError, "shape depends on values", lambda: torch.where(x))
    refused(TypeError, "unsupported operand", lambda: x + "1")
    refused(TypeError, "unsupported operand", lambda: np.ones(3) * x)
    refused(TypeError, "gather.*numpy", lambda: np.asarray(x))
    refused(RuntimeError, "broadcast", lambda: x + torch.ones(4))
    refused(
        ValueError, "broadcast there to 5", lambda: tg.shard(t[:1], client=four) + torch.ones(5, 3)
    )
    refused(ValueError, "lie differently.*reshard", lambda: x + x.reshard(1))
    refused(ValueError, "lie differently", lambda: x[1:] + tg.shard(t[1:], client=four))
    refused(ValueError, "lie differently", lambda: x + tg.shard(t, None, workers=[0], client=four))
    refused(RuntimeError, "floating point|dtype", lambda: tg.shard(t.long(), client=four).mean())
    refused(IndexError, "no dimension 2", lambda: x.sum(2))
    refused(ValueError, "twice", lambda: x.sum((0, -2)))
    refused(TypeError, "argument", lambda: x.max(0))
    refused(tg.LayerError, "'wrong'.*raised KeyError", lambda: x.map(wrong))
    refused(tg.LayerError, "of that shape; it gave float32", lambda: x.map(lambda part: part.T))
    refused(tg.LayerError, "takes a gradient", lambda: x.map(lambda p: p.clone().requires_grad_()))


def wrong(part):
    raise KeyError("no")


def test_no_gradient_is_lost_without_a_word(client):
    t = torch.ones(4, requires_grad=True)
    x = tg.shard(t.detach(), client=client)
    with pytest.raises(tg.TaskgradError, match=r"detach.*torch.func.grad"):
        tg.shard(t, client=client)
    for use in (lambda: x * t, lambda: t + x, lambda: torch.where(x > 0, t, x)):
        with pytest.raises(tg.TaskgradError, match="takes a gradient.*no_grad"):
            use()
    with torch.no_grad():
        same(tg.shard(t, client=client) * t, torch.ones(4))


def test_random_numbers_of_map_are_fixed_by_the_seed(client):
    x = tg.shard(torch.zeros(6, 2), client=client)
    torch.manual_seed(3)
    first = x.map(torch.rand_like).gather()
    torch.manual_seed(3)
    assert torch.equal(x.map(torch.rand_like).gather(), first)
    assert not torch.equal(first[:3], first[3:])


def test_who_holds_what_is_shown(client):
    x = tg.shard(torch.ones(7, 3), client=client)
    assert repr(x) == "ShardedTensor(float32[7, 3], axis 0: 0:4 on 0, 4:7 on 1)"
    assert repr(x.reshard(None)) == "ShardedTensor(float32[7, 3], a copy on 0, 1)"
    html = x._repr_html_()
    for part in x.parts:
        assert str(part.worker) in html
    assert '<rect x="0" y="0" width="274"' in html
    assert '<rect x="274" y="0" width="206"' in html
    assert "<td>4:7</td><td>[3, 3]</td><td>36</td>" in html
    assert "<td>all</td><td>[7, 3]</td><td>84</td>" in x.reshard(None)._repr_html_()
    assert repr(x.parts[1]).startswith("Part(worker='1 (tcp://")
