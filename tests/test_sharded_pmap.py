"""Sharded tensors with pmap: results that stay, arguments that are read where they are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import keys_of, total_held, wait_until
from helpers import known_to_scheduler, long
from taskgrad.cluster.wire import message_leases

MEGABYTE = 1 << 18  # float32 numbers
SMALL = 100_000  # bytes: more than messages take, and less than a tensor of these tests


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def same(ours, theirs: torch.Tensor, layout: tg.Sharded) -> None:
    assert isinstance(ours, tg.ShardedTensor)
    assert ours.layout == layout
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.gather(), theirs)


def traffic(client) -> dict[str, int]:
    """Bytes that each process has sent by Dask's transfers, or read in another's memory."""

    def of_worker(dask_worker) -> int:
        return int(dask_worker.transfer_outgoing_bytes_total) + message_leases.bytes_read()

    return {**client.run(of_worker), "driver": message_leases.bytes_read()}


def moved(client, before: dict[str, int]) -> list[int]:
    return [now - before[process] for process, now in traffic(client).items()]


def placed(x: tg.ShardedTensor) -> list[tuple[object, int, int]]:
    return [(part.worker.name, part.start, part.stop) for part in x.parts]


def test_results_stay_as_out_axes_say(client):
    t = torch.randn(8, 3)

    def f(x):
        total = tg.psum(x, "i")
        return {"x": x * 2, "total": total}, Pair(x + 1, x.sum()), [tg.axis_index("i"), None, 0.5]

    out_axes = (
        {"x": tg.Sharded(1), "total": tg.Sharded(None)},
        Pair(0, tg.Sharded(-1)),
        [tg.Sharded(0), tg.Sharded(0), tg.Sharded(None)],
    )
    found, pair, rest = tg.pmap(f, "i", out_axes=out_axes, client=client)(t)
    same(found["x"], (t * 2).T, tg.Sharded(1))
    assert placed(found["x"]) == [(0, 0, 4), (1, 4, 8)]
    total = tg.pmap(f, "i", out_axes=(0, 0, 0), client=client)(t)[0]["total"][0]
    same(found["total"], total, tg.Sharded(None))
    assert placed(found["total"]) == [(0, 0, 0), (1, 0, 0)]
    assert torch.equal(pair.left, t + 1)
    same(pair.right, torch.stack([row.sum() for row in t]), tg.Sharded(0))
    same(rest[0], torch.arange(8), tg.Sharded(0))
    assert rest[1:] == [None, 0.5]


@pytest.mark.parametrize("size", [1, 2, 5, *long(3, 4, 6, 7, 8)])
def test_gather_false_with_any_number_of_ranks(four, size):
    t = torch.randn(size, 2)
    stays = tg.pmap(lambda x: (x.exp(), 7), out_axes=(1, None), gather=False, client=four)
    kept, number = stays(t)
    same(kept, t.exp().T, tg.Sharded(1))
    assert number == 7
    again = tg.pmap(lambda x, y: x - y, in_axes=(1, 0), client=four)
    before = four.run_on_scheduler(sends)
    assert torch.equal(again(kept, tg.shard(t, client=four)), t.exp() - t)
    # It is read where pmap has put it: nothing was cut out to be sent.
    assert four.run_on_scheduler(sends) == before
    backwards = tg.shard(t, workers=[3, 2, 1, 0], client=four)
    assert torch.equal(again(kept, backwards), t.exp() - t)
    assert four.run_on_scheduler(sends) != before


def sends(dask_scheduler) -> set[str]:
    """The tasks that cut out what is sent to another worker."""
    keys = {str(event[0]) for event in dask_scheduler.transition_log}
    return {key for key in keys if "sharded:send" in key}


@pytest.mark.parametrize("workers", long(1, 2, 3))
@pytest.mark.parametrize("size", long(1, 2, 3, 8))
def test_the_same_bits_on_any_number_of_workers(fresh, workers, size):
    client = fresh(n_workers=workers)
    torch.manual_seed(0)
    t = torch.randn(size, 4, 3)

    def f(x, w):
        return tg.pmean(x @ w, "i"), x.T + w.sum()

    w = torch.randn(3, 2)
    sharded = tg.pmap(f, "i", in_axes=(0, None), out_axes=(None, 2), gather=False, client=client)
    mean, rest = sharded(tg.shard(t, client=client), tg.shard(w, None, client=client))
    total = t[0] @ w
    for row in t[1:]:
        total = total + row @ w
    same(mean, total / size, tg.Sharded(None))
    same(rest, torch.stack([row.T + w.sum() for row in t], 2), tg.Sharded(2))
    same(rest * 2 - mean.sum(), rest.gather() * 2 - mean.gather().sum(), tg.Sharded(2))


def test_arguments_where_they_are_move_no_bytes(client):
    """Each tensor has a megabyte for each rank, and what moved in all is less than a tenth."""
    x = tg.shard(torch.randn(8, MEGABYTE), client=client)
    w = tg.shard(torch.randn(MEGABYTE), None, client=client)
    f = tg.pmap(lambda x, w: (x * w, x.sum()), in_axes=(0, None), out_axes=(tg.Sharded(0), 0))
    before = traffic(client)
    y, sums = f(x, w)
    assert max(moved(client, before)) < SMALL
    assert torch.equal(y.gather(), x.gather() * w.gather())
    assert torch.equal(sums, torch.stack([row.sum() for row in x.gather()]))


def test_other_layouts_are_sent_from_worker_to_worker(client):
    t = torch.randn(8, MEGABYTE // 8)
    f = tg.pmap(lambda x: x + 1, out_axes=tg.Sharded(0), client=client)
    other = tg.shard(t, 0, workers=[1, 0], client=client)
    before = traffic(client)
    y = f(other)
    # The driver sees none of it.
    assert traffic(client)["driver"] - before["driver"] < SMALL
    assert max(moved(client, before)) > t.nbytes // 4
    same(y, t + 1, tg.Sharded(0))
    for given in (
        *(tg.shard(t, None, client=client), tg.shard(t, None, workers=[1], client=client)),
        *(tg.shard(t, 1, client=client), y - 1, other[0:8]),
    ):
        same(f(given), given.gather() + 1, tg.Sharded(0))
    whole = tg.pmap(lambda x, y: x.sum() + y.sum(), in_axes=(0, None), client=client)
    for given in (other, y, tg.shard(t, None, workers=[0], client=client)):
        total = given.gather().sum()
        expected = torch.stack([row.sum() + total for row in t])
        assert torch.equal(whole(t, given), expected)


def test_nested_maps_read_sharded_arguments(client):
    t = torch.randn(2, 3, 4)
    u = torch.randn(3, 2)
    f = tg.pmap(
        tg.pmap(lambda x, y, z: x * y + z.sum(), "j", in_axes=(0, 0, None)),
        "i",
        in_axes=(0, 1, None),
        client=client,
    )
    expected = t * u.T[..., None] + t.sum()
    for axis in (0, 1, 2, None):
        x = tg.shard(t, axis, client=client)
        y = tg.shard(u, 1 if axis == 2 else 0, client=client)
        torch.testing.assert_close(f(x, y, x), expected)
        torch.testing.assert_close(f(x, u, t), expected)


def test_a_loop_of_steps_leaves_its_parameters_out_there(client):
    """Linear regression; parameters of a megabyte, and of the data only the batch is sent."""
    torch.manual_seed(0)
    known = known_to_scheduler(client)
    features = MEGABYTE
    x, t = torch.randn(2, 1, features), torch.randn(2, 1)
    start = torch.zeros(features)

    def step(w, x, t):
        grad, loss = torch.func.grad_and_value(loss_of)(w, x, t)
        return w - 1e-7 * tg.pmean(grad, "batch"), tg.pmean(loss, "batch")

    out_axes = (tg.Sharded(None), None)
    f = tg.pmap(step, "batch", in_axes=(None, 0, 0), out_axes=out_axes, client=client)
    w = tg.shard(start, None, client=client)
    data = tg.shard(x, client=client), tg.shard(t, client=client)
    g = tg.pmap(step_alone, in_axes=(0, 0, 0), out_axes=tg.Sharded(0), client=client)
    alone = tg.shard(torch.zeros(2, features), client=client)
    before = traffic(client)
    for _ in range(3):
        alone = g(alone, *data)  # no collective: what would move are the parameters
    assert max(moved(client, before)) < SMALL
    losses = []
    for _ in range(3):
        w, loss = f(w, *data)
        losses.append(float(loss))
    assert traffic(client)["driver"] - before["driver"] < SMALL
    expected = start
    for _ in range(3):
        both = [
            torch.func.grad(lambda w, i=i: ((x[i] @ w - t[i]) ** 2).mean())(expected)
            for i in (0, 1)
        ]
        expected = expected - 1e-7 * ((both[0] + both[1]) / 2)
    assert torch.equal(w.gather(), expected)
    assert losses == sorted(losses, reverse=True)
    # One copy of the parameters on each worker, and nothing of earlier steps.
    assert wait_until(lambda: total_held(client)["parts"] == 2 * len({*data, w, alone}))
    assert len(known_to_scheduler(client) - known) == 2 * len({*data, w, alone})


def step_alone(w, x, t):
    return w - 1e-7 * torch.func.grad(loss_of)(w, x, t)


def loss_of(w, x, t):
    return ((x @ w - t) ** 2).mean()


def test_a_gradient_that_would_be_lost_is_refused(client):
    x = torch.ones(2, 3)
    model = nn.Linear(3, 1)
    before = len(keys_of(client, "forward"))
    for f, given in (
        (tg.pmap(lambda x: x * 2, gather=False, client=client), x.clone().requires_grad_()),
        (tg.pmap(lambda x: model(x), out_axes=tg.Sharded(0), client=client), x),
    ):
        with pytest.raises(tg.TaskgradError, match=r"torch\.func\.grad.*torch\.no_grad"):
            f(given)
    assert len(keys_of(client, "forward")) == before
    with torch.no_grad():
        y = tg.pmap(lambda x: model(x), out_axes=tg.Sharded(0), client=client)(x)
    same(y, torch.stack([model(row) for row in x]).detach(), tg.Sharded(0))
    # Where all results come home, gradients of the other arguments flow.
    scale = torch.tensor(3.0, requires_grad=True)
    f = tg.pmap(lambda x, scale: x * scale, in_axes=(0, None), client=client)
    f(tg.shard(x, client=client), scale).sum().backward()
    assert scale.grad == 6


def test_what_does_not_fit_is_refused(client):
    t = torch.arange(4.0)

    def refused(kind, text, fn=lambda x: x, given=t, **options):
        with pytest.raises(kind, match=text):
            tg.pmap(fn, client=client, **options)(given)

    stays = tg.Sharded(0)
    refused(ValueError, "0 and 1 gave .* other values", out_axes=tg.Sharded(None))
    refused(ValueError, "out_axes 3 is no axis", out_axes=tg.Sharded(3))
    refused(ValueError, "not a prefix", out_axes=(stays, stays))
    refused(TypeError, "got a str", lambda x: "word", out_axes=stays)
    refused(
        TypeError, "torch.sparse_coo: return a dense", lambda x: x[None].to_sparse(), out_axes=stays
    )
    ragged = "differ in shape or dtype"
    refused(ValueError, ragged, lambda x: torch.ones(int(x)), out_axes=stays)
    refused(ValueError, ragged, lambda x: torch.ones(int(x)), out_axes=tg.Sharded(None))
    refused(tg.LayerError, "rank 0", lambda x: x.nothing(), out_axes=stays)
    refused(TypeError, "in_axes", in_axes=stays)
    refused(TypeError, "gather is True or False", gather=0)
    refused(ValueError, "has no axis 1 to map", given=tg.shard(t, client=client), in_axes=1)
    y = tg.shard(t, client=client)
    refused(TypeError, "as an argument", lambda x: x + y)
    with pytest.raises(NotImplementedError, match="nested maps do not stay"):
        tg.pmap(tg.pmap(torch.sin), gather=False)
    with pytest.raises(tg.LayerError, match="NotImplementedError|TaskgradError"):
        tg.pmap(lambda x: tg.pmap(torch.sin, gather=False)(x[None]), client=client)(t)
    assert wait_until(lambda: total_held(client)["parts"] == len(y.parts))


def test_buffers_are_written_back_from_results_that_stay(client):
    norm = nn.BatchNorm1d(3)
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        y = tg.pmap(lambda x: norm(x), out_axes=tg.Sharded(0), client=client)(x)
        plain = nn.BatchNorm1d(3)
        expected = plain(x[0])
    torch.testing.assert_close(y[0].gather(), expected)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
