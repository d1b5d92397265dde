"""The differentiable map: values and gradients are those of a loop, wherever the items run."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from distributed import Client, get_worker
from torch import nn

import taskgrad as tg
from conftest import keys_of, total_held, wait_until
from helpers import assert_same
from taskgrad.mapping.segments import cut, share

MODES = ("threads", "processes", "both")
EAGER = (None, True, False)


@pytest.fixture(scope="module")
def wide() -> Iterator[Client]:
    """ParallelGradient's own setting: two processes of three threads."""
    client = tg.local_cluster(n_workers=2, threads_per_worker=3, dashboard_address=":0")
    yield client
    client.close()


@pytest.fixture
def unhurried(client: Client) -> Iterator[Client]:
    """Its workers differentiate small chunks at once, though a busy machine be slow to run them."""

    def patience(seconds: float) -> float:
        from taskgrad.mapping import eager

        before, eager._MOST_S = eager._MOST_S, seconds
        return before

    [before] = set(client.run(patience, 60).values())
    yield client
    client.run(patience, before)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))


@pytest.fixture
def columns() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 5, requires_grad=True), torch.randn(9, 1)


def taken(tensors) -> list[torch.Tensor | None]:
    """The gradients of these tensors, which have none afterwards."""
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return found


def assert_close(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def by_chunks(outputs, takers, workers) -> list[torch.Tensor]:
    """What a loop gives that goes back through chunks of items, from the last to the first.

    `workers` has the chunks of each, which are summed first; `outputs` are losses.
    """

    def back(r):
        losses = [outputs[i] for i in r]
        ones = [torch.ones_like(o) for o in losses]
        return torch.autograd.grad(losses, takers, ones, retain_graph=True)

    def added(parts):
        return [functools.reduce(torch.add, column) for column in zip(*parts, strict=True)]

    return added([added([back(r) for r in reversed(ranges)]) for ranges in reversed(workers)])


def in_threads_of(r: range, threads: int) -> list[range]:
    return [range(r.start + p.start, r.start + p.stop) for p in share(len(r), [1] * threads)]


# -- ParallelGradient's check ----------------------------------------------------------------------


@pytest.mark.parametrize("eager", EAGER)
@pytest.mark.parametrize("over", MODES)
def test_dense_5_6_7_1_over_9_columns_as_losses(wide, model, columns, over, eager):
    xs, ys = columns

    def fn(x, y):
        return ((model(x) - y) ** 2).sum()

    takers = [*model.parameters(), xs]
    outputs = [fn(x, y) for x, y in zip(xs, ys, strict=True)]
    loss = sum(outputs)
    loop = torch.autograd.grad(loss, takers, retain_graph=True)
    for _ in range(2):
        found = tg.map(fn, xs, ys, over=over, eager_grad=eager, client=wide)
        total = sum(found)
        assert_same(total.detach(), loss.detach())
        total.backward()
        ours = taken(takers)
        assert_close(ours, loop)
        if over != "threads":  # there it depends on the machine's cores
            threads = 3 if over == "both" else 1
            workers = [in_threads_of(r, threads) for r in share(9, [1, 1])]
            for a, b in zip(ours, by_chunks(outputs, takers, workers), strict=True):
                assert_same(a, b)
    del found, total
    assert wait_until(lambda: not any(total_held(wide).values()))


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("over", MODES)
def test_dense_5_6_7_1_over_9_columns_in_the_middle_of_a_model(
    wide, model, columns, over, chunksize
):
    """Its `loss`: the first layer before the map, the last one after it."""
    xs, ys = columns
    first, middle, last = model[:2], model[2:4], model[4:]
    takers = [*model.parameters(), xs]

    def loss(mapped):
        return ((last(torch.stack(mapped(first(xs)))) - ys) ** 2).sum()

    loop = loss(lambda hs: [middle(h) for h in hs])
    theirs = torch.autograd.grad(loop, takers)
    for _ in range(2):
        ours = loss(lambda hs: tg.map(middle, hs, over=over, chunksize=chunksize, client=wide))
        assert_same(ours.detach(), loop.detach())
        ours.backward()
        assert_close(taken(takers), theirs)


def test_threads_with_chunks_of_one_give_the_bits_of_a_loop(model, columns):
    xs, ys = columns
    fn = lambda x, y: ((model(x) - y) ** 2).mean()  # noqa: E731
    takers = [*model.parameters(), xs]
    theirs = torch.autograd.grad(sum(map(fn, xs, ys)), takers)
    sum(tg.map(fn, xs, ys, over="threads", chunksize=1)).backward()
    for a, b in zip(taken(takers), theirs, strict=True):
        assert_same(a, b)


def test_after_a_worker_joined(fresh, model, columns):
    client = fresh(n_workers=2)
    xs, ys = columns
    fn = lambda x, y: ((model(x) - y) ** 2).sum()  # noqa: E731
    takers = [*model.parameters(), xs]
    loss = sum(map(fn, xs, ys))
    theirs = torch.autograd.grad(loss, takers)
    before = tg.map(fn, xs, ys, eager_grad=False, client=client)
    client.cluster.scale(3)
    client.wait_for_workers(3, timeout=200)
    after = tg.map(fn, xs, ys, eager_grad=False, client=client)
    assert sorted(c["tapes"] for c in client.run(_held).values()) == [1, 2, 2]
    for found in (before, after):
        assert_same(sum(found).detach(), loss.detach())
        sum(found).backward()
        assert_close(taken(takers), theirs)


def _held(dask_worker):
    from taskgrad.cluster.tasks import held

    return held(dask_worker)


# -- what fn closes over ---------------------------------------------------------------------------


class Scaled:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.scale = torch.tensor(2.0, requires_grad=True)

    def loss(self, x):
        return (self.scale * self.model(x)).sum()

    def __call__(self, x):
        return self.loss(x)


def with_parameter(model, x):
    return model(x).sum()


def ways_to_close_over(model):
    scaled = Scaled(model)

    def with_default(x, m=model):
        return m(x).sum()

    return {
        "closure": (lambda x: model(x).sum(), []),
        "partial": (functools.partial(with_parameter, model), []),
        "bound method": (scaled.loss, [scaled.scale]),
        "callable object": (scaled, [scaled.scale]),
        "module": (model, []),
        "default argument": (with_default, []),
        "in a container": (lambda x, held={"a": [model]}: held["a"][0](x).sum(), []),
    }


@pytest.mark.parametrize("over", ["threads", "processes"])
@pytest.mark.parametrize(
    "way",
    [
        *("closure", "partial", "bound method", "callable object", "module"),
        *("default argument", "in a container"),
    ],
)
def test_gradients_of_what_it_closes_over(client, model, columns, way, over):
    fn, more = ways_to_close_over(model)[way]
    xs, _ = columns
    takers = [*model.parameters(), *more, xs]
    theirs = torch.autograd.grad(sum(o.sum() for o in map(fn, xs)), takers)
    sum(o.sum() for o in tg.map(fn, xs, over=over, client=client)).backward()
    assert_close(taken(takers), theirs)


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_tied_weights_get_the_sum_once(client, over):
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    xs = torch.randn(5, 3)
    theirs = torch.autograd.grad(sum(tied(x).sum() for x in xs), list(tied.parameters()))
    sum(y.sum() for y in tg.map(tied, xs, over=over, client=client)).backward()
    assert_close(taken(list(tied.parameters())), theirs)


@pytest.mark.parametrize("chunksize", [None, 1, 4])
@pytest.mark.parametrize("over", MODES)
def test_what_it_closes_over_may_have_a_history(client, over, chunksize):
    w = torch.randn(3, requires_grad=True)
    xs = torch.randn(4, 3)

    def loss(mapped):
        h = torch.exp(w)  # used in the map by every item, beside w itself, and after the map
        return sum(mapped(lambda x: ((h - x) ** 2 * w).sum(), xs)) + h.sum()

    (theirs,) = torch.autograd.grad(loss(map), [w])
    loss(functools.partial(tg.map, over=over, chunksize=chunksize, client=client)).backward()
    assert_close(taken([w]), [theirs])


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_hooks_of_what_it_closes_over_are_called_once(client, over):
    w = torch.ones(3, requires_grad=True)
    calls = []
    w.register_hook(lambda g: calls.append(1) or g * 2)
    sum(
        tg.map(lambda x: (w * x).sum(), torch.ones(4, 3), over=over, chunksize=1, client=client)
    ).backward()
    assert calls == [1]
    assert w.grad.tolist() == [8, 8, 8]


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_what_needs_no_gradient_gets_none(client, model, over):
    model[0].weight.requires_grad_(False)
    data = torch.randn(5)
    assert not tg.map(lambda x: x + data, [data, data], over=over, client=client)[0].requires_grad
    out = tg.map(lambda x: (model(x), x.detach() * 2, 3), [data], over=over, client=client)[0]
    assert [t.requires_grad for t in out[:2]] == [True, False]
    out[0].sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


weights = nn.Linear(3, 1)


def uses_a_global(x):
    return weights(x).sum()


def test_a_global_that_a_worker_imports_for_itself_is_refused(client):
    """The worker's own copy of it would be used, with other weights and no gradient."""
    with pytest.raises(TypeError, match="uses_a_global.*global of a module.*functools.partial"):
        tg.map(uses_a_global, torch.ones(2, 3), client=client)
    sum(tg.map(uses_a_global, torch.ones(2, 3), over="threads")).backward()
    assert taken(list(weights.parameters()))[1].tolist() == [2]


def test_globals_of_a_script_are_differentiated(client):
    script = f"""
        import torch, taskgrad as tg
        from distributed import Client

        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        scale = torch.tensor(2.0, requires_grad=True)

        def helper(x):
            return model(x)

        def fn(x):
            return (scale * helper(x)).sum()

        if __name__ == "__main__":
            client = Client({client.scheduler.address!r})
            takers = [scale, *model.parameters()]
            xs = torch.randn(4, 3)
            theirs = torch.autograd.grad(sum(map(fn, xs)), takers)
            ours = torch.autograd.grad(sum(tg.map(fn, xs)), takers)
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b)
            print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "equal\n", done.stderr


# -- items and results -----------------------------------------------------------------------------


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


@pytest.mark.parametrize("over", MODES)
def test_items_and_results_are_pytrees(client, over):
    xs = [{"x": torch.full((2,), float(i), requires_grad=True), "n": i} for i in range(5)]
    pairs = [Pair(torch.ones(2, requires_grad=True), i) for i in range(5)]
    out = tg.map(
        lambda d, p: {"y": (d["x"] * p.a * p.b,), "none": None, "n": d["n"]},
        xs,
        (p for p in pairs),
        over=over,
        client=client,
    )
    assert [o["n"] for o in out] == [0, 1, 2, 3, 4]
    assert all(o["none"] is None for o in out)
    sum(o["y"][0].sum() for o in out).backward()
    for i in range(5):
        assert_same(xs[i]["x"].grad, torch.full((2,), float(i)))
        assert_same(pairs[i].a.grad, torch.full((2,), float(i * i)))


@pytest.mark.parametrize("over", MODES)
def test_order_is_kept(client, over):
    for count, chunksize in itertools.product([0, 1, 7], [None, 1, 3, 100]):
        items = (i for i in range(count))
        found = tg.map(lambda i: i * 2, items, over=over, chunksize=chunksize, client=client)
        assert found == [2 * i for i in range(count)]


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_unequal_lengths_are_an_error_before_anything_runs(client, over, tmp_path):
    path = tmp_path / "ran"
    with pytest.raises(ValueError, match="position 1 ended after 2 items.*position 0 has more"):
        tg.map(lambda a, b: path.touch(), range(3), iter([1, 2]), over=over, client=client)
    with pytest.raises(ValueError, match="position 0 ended after 3 items"):
        tg.map(lambda a, b: path.touch(), range(3), itertools.repeat(1), over=over, client=client)
    assert not path.exists()


def test_thunks_among_the_items_are_collected(client):
    x = torch.ones(3, requires_grad=True)
    doubled = tg.spawn(torch.mul, x, 2)
    sum(tg.map(torch.sum, [doubled, doubled], client=client)).backward()
    assert x.grad.tolist() == [4, 4, 4]


@pytest.mark.parametrize("over", MODES)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_reduce(client, model, columns, over, reduce):
    xs, _ = columns
    takers = [*model.parameters(), xs]

    def fn(x):
        return {"loss": model(x).sum(), "features": model[:3](x), "count": 1}

    def reduced(results):
        total = {k: sum(r[k] for r in results) for k in results[0]}
        return {k: v / 9 if reduce == "mean" else v for k, v in total.items()}

    theirs = reduced([fn(x) for x in xs])
    ours = tg.map(fn, xs, over=over, reduce=reduce, chunksize=2, client=client)
    assert ours["count"] == theirs["count"]
    assert_close([ours["loss"], ours["features"]], [theirs["loss"], theirs["features"]])
    grads = torch.autograd.grad(theirs["loss"] + (theirs["features"] ** 2).sum(), takers)
    (ours["loss"] + (ours["features"] ** 2).sum()).backward()
    assert_close(taken(takers), grads)


def test_what_cannot_be_added_up(client):
    for over in ("threads", "processes"):
        with pytest.raises(TypeError, match="adds up tensors and numbers.*str"):
            tg.map(str, range(3), reduce="sum", over=over, client=client)
    with pytest.raises(ValueError, match="no items"):
        tg.map(str, [], reduce="sum")


# -- gradients in one round trip -------------------------------------------------------------------


def backwards(client) -> int:
    return len(keys_of(client, "backward:"))


@pytest.mark.parametrize("chunksize", [None, 2])
def test_losses_are_differentiated_in_one_round_trip(unhurried, model, columns, chunksize):
    client, (xs, _) = unhurried, columns
    takers = [*model.parameters(), xs]
    fn = lambda x: model(x).sum()  # noqa: E731
    before = backwards(client)
    sum(tg.map(fn, xs, chunksize=chunksize, client=client)).backward()
    assert backwards(client) == before
    eager = taken(takers)
    sum(tg.map(fn, xs, chunksize=chunksize, eager_grad=False, client=client)).backward()
    assert backwards(client) == before + 2  # one a worker, whatever the chunks
    for a, b in zip(eager, taken(takers), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("eager", EAGER)
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_a_loss_with_extras(client, model, columns, eager, reduce):
    """ParallelGradient asserts that nothing but the loss has a cotangent."""
    xs, _ = columns
    takers = [*model.parameters(), xs]

    def fn(x):
        y = model[:4](x)
        return model[4](y).sum(), y, 3

    def losses(results):
        if reduce is not None:
            return results[0], results[0] + (results[1] ** 2).sum()
        first = sum(r[0] for r in results)
        return first, first + sum((r[1] ** 2).sum() for r in results)

    expected = [fn(x) for x in xs]
    if reduce is not None:
        expected = [sum(r[k] for r in expected) / 9 for k in range(3)]
    for which in (0, 1):
        theirs = torch.autograd.grad(losses(expected)[which], takers, retain_graph=True)
        found = tg.map(fn, xs, eager_grad=eager, reduce=reduce, client=client)
        losses(found)[which].backward()
        assert_close(taken(takers), theirs)


@pytest.mark.parametrize("eager", EAGER)
def test_unequal_cotangents(client, model, columns, eager):
    xs, _ = columns
    takers = [*model.parameters(), xs]
    fn = lambda x: model(x).sum()  # noqa: E731
    weighted = lambda losses: sum(i * loss for i, loss in enumerate(losses))  # noqa: E731
    theirs = torch.autograd.grad(weighted([fn(x) for x in xs]), takers)
    weighted(tg.map(fn, xs, eager_grad=eager, client=client)).backward()
    assert_close(taken(takers), theirs)


def test_without_being_asked_only_what_gives_the_same_bits_is_used(unhurried, model, columns):
    """A factor of 1/3 rounds otherwise after the backward than before it; 1/4 does not."""
    client, (xs, _) = unhurried, columns
    takers = [*model.parameters(), xs]
    fn = lambda x: model(x).sum()  # noqa: E731
    for factor, trips in ((1 / 3, 2), (1 / 4, 0)):
        before = backwards(client)
        (sum(tg.map(fn, xs, client=client)) * factor).backward()
        assert backwards(client) == before + trips
        ours = taken(takers)
        (sum(tg.map(fn, xs, eager_grad=False, client=client)) * factor).backward()
        for a, b in zip(ours, taken(takers), strict=True):
            assert_same(a, b)
    before = backwards(client)
    (sum(tg.map(fn, xs, eager_grad=True, client=client)) / 3).backward()
    assert backwards(client) == before
    assert_close(taken(takers), torch.autograd.grad(sum(map(fn, xs)) / 3, takers))


def test_a_mean_is_one_round_trip_too(unhurried, model, columns):
    client, (xs, _) = unhurried, columns
    before = backwards(client)
    tg.map(lambda x: model(x).sum(), xs, reduce="mean", client=client).backward()
    assert backwards(client) == before


@pytest.mark.parametrize("factor", [1, 1 / 3])
def test_a_backward_that_came_twice_is_expected(client, columns, factor):
    """Whatever it takes and whatever its cotangent is, and with the same bits."""
    xs, _ = columns
    w = torch.ones(600, 600, requires_grad=True)  # more than is sent home unasked
    fn = lambda x: (x.sum() * w.sin()).mean()  # noqa: E731

    def step(**options):
        (sum(tg.map(fn, xs, client=client, **options)) * factor).backward()
        return taken([w, xs])

    lazy = step(eager_grad=False)
    trips = []
    for _ in range(4):
        before = backwards(client)
        for a, b in zip(step(), lazy, strict=True):
            assert_same(a, b)
        trips.append(backwards(client) - before)
    assert trips == [2, 2, 0, 0]
    before = backwards(client)
    sum(i * loss for i, loss in enumerate(tg.map(fn, xs, client=client))).backward()
    assert backwards(client) == before + 2  # made in vain; not what was expected
    taken([w, xs])
    before = backwards(client)
    step()
    assert backwards(client) == before + 2
    assert wait_until(lambda: not any(total_held(client).values()))


def test_no_backward_is_expected_of_a_function_that_is_evaluated_in_between(client, columns):
    xs, _ = columns
    w = torch.ones(600, 600, requires_grad=True)

    def fn(x):
        return (x.sum() * w.sin()).mean()

    for _ in range(4):
        before = backwards(client)
        sum(tg.map(functools.partial(fn), xs, client=client)).backward()
        assert backwards(client) == before + 2
        with torch.no_grad():
            tg.map(fn, xs, client=client)  # keeps nothing, says nothing
        tg.map(fn, xs, client=client)


def test_eager_gradients_need_losses(client):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="eager_grad=True.*neither a 0-d tensor"):
        tg.map(lambda x: x * 2, [x], eager_grad=True, client=client)
    assert wait_until(lambda: not any(total_held(client).values()))


# -- as any part of autograd's graph ---------------------------------------------------------------


@pytest.mark.parametrize("eager", [None, False])
@pytest.mark.parametrize("over", MODES)
def test_retain_graph_and_second_use(client, columns, over, eager):
    xs, _ = columns
    loss = sum(tg.map(lambda x: (x**2).sum(), xs, over=over, eager_grad=eager, client=client))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(xs.grad, 4 * xs.detach())
    # What torch itself saved between the map and the loss is nothing, so the error is the map's.
    with pytest.raises(tg.TapeError, match="second time.*retain_graph=True"):
        loss.backward()
    assert wait_until(lambda: not any(total_held(client).values()))


@pytest.mark.parametrize("over", MODES)
def test_each_result_can_be_differentiated_by_itself(client, over):
    xs = [torch.full((2,), float(i), requires_grad=True) for i in range(5)]
    w = torch.ones(2, requires_grad=True)
    losses = tg.map(lambda x: (w * x**2).sum(), xs, over=over, eager_grad=False, client=client)
    for i in (3, 0, 4):
        losses[i].backward()
        assert_same(xs[i].grad, 2 * xs[i].detach())
    assert xs[1].grad is None
    assert w.grad.tolist() == [25, 25]
    with pytest.raises(tg.TapeError, match="result 3 of a map of 'lambda'"):
        losses[3].backward()
    (losses[1] + losses[2]).backward()
    assert wait_until(lambda: not any(total_held(client).values()))


@pytest.mark.parametrize("over", MODES)
def test_autograd_grad_accumulates_nothing(client, model, columns, over):
    xs, _ = columns
    loss = sum(tg.map(lambda x: model(x).sum(), xs, over=over, client=client))
    (gx,) = torch.autograd.grad(loss, [xs])
    assert_same(gx, torch.autograd.grad(sum(model(x).sum() for x in xs), [xs])[0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("over", MODES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept(client, model, columns, over, guard):
    xs, _ = columns
    with guard():
        found = tg.map(model, xs, over=over, client=client)
        assert total_held(client)["tapes"] == 0
        expected = [model(x) for x in xs]
    assert not any(y.requires_grad for y in found)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("over", MODES)
def test_autocast_and_default_dtype_are_the_callers(client, model, columns, over):
    xs, _ = columns
    with torch.autocast("cpu", torch.bfloat16):
        found = tg.map(lambda x: model(x[None]), xs, over=over, client=client)
        expected = [model(x[None]) for x in xs]
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert_same(a.detach(), b.detach())
    torch.set_default_dtype(torch.float64)
    try:
        made = tg.map(lambda n: torch.ones(n), [1, 2, 3], over=over, client=client)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in made} == {torch.float64}
    assert tg.map(lambda n: torch.ones(n), [1], over=over, client=client)[0].dtype == torch.float32


@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_threads_can_be_differentiated_twice(model, columns, chunksize):
    """A gradient penalty, and a third derivative."""
    xs, _ = columns
    takers = [*model.parameters(), xs]

    def penalty(mapped):
        (gx,) = torch.autograd.grad(
            sum(mapped(lambda x: model(x).sum() ** 2, xs)), xs, create_graph=True
        )
        (ggx,) = torch.autograd.grad((gx**2).sum(), xs, create_graph=True)
        return (gx**2).sum() + (ggx**3).sum()

    theirs = torch.autograd.grad(penalty(map), takers)
    ours = torch.autograd.grad(
        penalty(functools.partial(tg.map, over="threads", chunksize=chunksize)), takers
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eager", [None, False])
def test_processes_refuse_to_be_differentiated_twice(client, columns, eager):
    xs, _ = columns
    loss = sum(tg.map(lambda x: (x**2).sum(), xs, eager_grad=eager, client=client))
    (gx,) = torch.autograd.grad(loss, [xs], create_graph=True)
    assert_same(gx.detach(), 2 * xs.detach())
    with pytest.raises(tg.TaskgradError, match='create_graph=True.*over="threads"'):
        gx.sum().backward()


@pytest.mark.parametrize("over", MODES)
def test_results_may_be_written_in_place(client, over):
    xs = [torch.ones(2, requires_grad=True) for _ in range(3)]
    losses = tg.map(lambda x: (3 * x).sum(), xs, over=over, client=client)
    total = losses[0]
    for loss in losses[1:]:
        total += loss
    total.backward()
    assert [x.grad.tolist() for x in xs] == [[3, 3]] * 3


@pytest.mark.parametrize("over", MODES)
def test_an_item_may_be_given_back_as_it_is(client, over):
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = tg.map(lambda x: (x, w), [x, x], over=over, client=client)
    sum((a + 2 * b).sum() for a, b in found).backward()
    assert x.grad.tolist() == [2, 2]
    assert w.grad.tolist() == [4, 4]


def test_items_that_are_written_in_place(client):
    w = torch.randn(4, 3, requires_grad=True)
    theirs = torch.autograd.grad(sum((w * 2)[i].relu_().sum() for i in range(4)), [w])
    for over in MODES:
        rows = list(w * 2)
        sum(tg.map(lambda x: x.relu_().sum(), rows, over=over, client=client)).backward()
        assert_close(taken([w]), theirs)


def test_dropping_the_results_releases_the_tapes(client, model, columns):
    found = tg.map(model, columns[0], chunksize=2, client=client)
    assert total_held(client)["tapes"] == 5
    del found
    assert wait_until(lambda: not any(total_held(client).values()))


# -- maps in maps, in chains; chains in maps -------------------------------------------------------


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", MODES)
def test_nested(client, model, columns, outer, inner):
    xs, _ = columns
    groups = [xs[:4], xs[4:], xs]
    takers = [*model.parameters(), xs]

    def both(mapped_outer, mapped_inner):
        return sum(mapped_outer(lambda g: sum(mapped_inner(lambda x: model(x).sum(), g)), groups))

    theirs = torch.autograd.grad(both(map, map), takers)
    ours = both(
        functools.partial(tg.map, over=outer, client=client),
        functools.partial(tg.map, over=inner),
    )
    ours.backward()
    assert_close(taken(takers), theirs)


class Mapped(nn.Module):
    """A layer that maps over the rows of what it gets."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 2)
        self.over = over

    def forward(self, xs):
        return torch.stack(tg.map(self.inner, xs, over=self.over))


def here(barrier, _):
    if barrier is not None:
        barrier.wait(30)  # so that no thread takes two items
    return threading.get_ident(), get_worker().address


@pytest.mark.parametrize(("over", "threads"), [("processes", 1), ("threads", 3), ("both", 3)])
def test_inside_a_task_its_worker_does_it_all(wide, over, threads):
    def mapped(_):
        barrier = threading.Barrier(threads) if threads > 1 else None
        return tg.map(functools.partial(here, barrier), range(3), over=over)

    (found,) = tg.map(mapped, [0], client=wide)
    assert len(set(found)) == threads
    assert len({address for _, address in found}) == 1


@pytest.mark.parametrize("over", MODES)
def test_in_a_layer_of_a_chain(wide, columns, over):
    torch.manual_seed(0)
    xs, _ = columns
    layers = nn.Sequential(nn.Linear(5, 5), Mapped(over), nn.Linear(2, 1))
    chain = tg.GraphChain(layers, client=wide)
    tg.collect(chain(xs)).sum().backward()
    ours = taken([xs])
    (theirs,) = torch.autograd.grad(layers(xs).sum(), [xs], retain_graph=True)
    assert_close(ours, [theirs])
    layers(xs).sum().backward()
    for name, grad in tg.collect(chain.grads()).items():
        assert_close([grad], [layers.get_parameter(name).grad])


def test_a_chain_inside_a_map(client, model, columns):
    xs, _ = columns
    chain = tg.GraphChain(model, client=client)
    for over in ("processes", "both"):
        with pytest.raises(TypeError, match="closes over a GraphChain.*to_module"):
            tg.map(lambda x: tg.collect(chain(x)), xs, over=over, client=client)
        with pytest.raises(TypeError, match="GraphChain runs on workers of its own"):
            tg.map(chain, xs, over=over, client=client)
    losses = tg.map(lambda x: tg.collect(chain(x)).sum(), xs, over="threads", chunksize=2)
    sum(losses).backward()
    ours = taken([xs])
    sum(model(x).sum() for x in xs).backward()
    assert_close(ours, taken([xs]))
    for name, grad in tg.collect(chain.grads()).items():
        assert_close([grad], [model.get_parameter(name).grad])


# -- random numbers --------------------------------------------------------------------------------


def test_random_numbers_depend_on_the_seed_and_the_item_alone(wide):
    x = torch.ones(100, requires_grad=True)
    fn = lambda i: F.dropout(x * i, 0.5)  # noqa: E731

    def drawn(**how):
        found = tg.map(fn, range(7), seed=3, client=wide, **how)
        (grad,) = torch.autograd.grad(sum(found).sum(), [x])
        return torch.stack(found).detach(), grad

    loop = []
    for i in range(7):
        with tg.random_stream(3, 0, i, "map"):
            loop.append(fn(i))
    first, grad = torch.stack(loop).detach(), torch.autograd.grad(sum(loop).sum(), [x])[0]
    before = torch.get_rng_state()
    for over in MODES:
        for chunksize in (None, 1, 3):
            values, ours = drawn(over=over, chunksize=chunksize)
            assert_same(values, first)
            assert_close([ours], [grad])
    assert torch.equal(torch.get_rng_state(), before)
    other = tg.map(fn, range(7), seed=4, client=wide)
    assert not torch.equal(torch.stack(other), first)


# -- errors ----------------------------------------------------------------------------------------


class TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fails_at(*indices: int, error: Exception, path=None):
    def fn(i, x):
        if i in indices:
            raise error
        if path is not None:
            with open(path, "a") as file:
                file.write(f"{i}\n")
        return (x * i).sum()

    return fn


@pytest.mark.parametrize("chunksize", [None, 1, 3])
@pytest.mark.parametrize("over", MODES)
def test_the_first_failing_items_own_exception(client, over, chunksize):
    x = torch.ones(2, requires_grad=True)
    fn = fails_at(5, 17, 18, error=ZeroDivisionError("mine"))
    with pytest.raises(ZeroDivisionError) as raised:
        tg.map(fn, range(20), [x] * 20, over=over, chunksize=chunksize, client=client)
    assert str(raised.value) == "mine"
    note = raised.value.__notes__[0]
    assert "item 5 of the map of 'fn'" in note
    assert "worker none" in note if over == "threads" else "(tcp://" in note
    assert wait_until(lambda: not any(total_held(client).values()))


@pytest.mark.parametrize("over", ["threads", "processes"])
def test_once_an_item_failed_the_rest_is_not_run(client, over, tmp_path):
    path = tmp_path / "ran"
    fn = fails_at(0, error=ValueError("no"), path=path)

    def slow(i, x):
        if i:
            import time

            time.sleep(0.1)
        return fn(i, x)

    with pytest.raises(ValueError, match="no"):
        tg.map(slow, range(60), torch.ones(60, 2), over=over, client=client)
    ran = len(path.read_text().split()) if path.exists() else 0
    assert ran < 25  # the other half would be 30


def test_an_exception_that_cannot_travel(client):
    def fn(i):
        raise TwoArguments(i, 2)

    with pytest.raises(tg.TravelError, match="TwoArguments: 0 and 2"):
        tg.map(fn, range(3), client=client)


def test_a_failing_backward(client):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("in backward")

    x = torch.ones(2, requires_grad=True)
    losses = tg.map(lambda x: Bad.apply(x).sum(), [x, x], eager_grad=False, client=client)
    with pytest.raises(tg.LayerError, match="backward of 'lambda' on worker.*ArithmeticError"):
        sum(losses).backward()
    assert wait_until(lambda: not any(total_held(client).values()))
    losses = tg.map(lambda x: Bad.apply(x).sum(), [x, x], client=client)  # unasked: not its fault
    assert [loss.item() for loss in losses] == [2, 2]
    with pytest.raises(tg.LayerError, match="ArithmeticError"):
        sum(losses).backward()
    with pytest.raises(tg.LayerError, match="backward of 'lambda' on worker.*ArithmeticError"):
        tg.map(lambda x: Bad.apply(x).sum(), [x, x], eager_grad=True, client=client)
    assert wait_until(lambda: not any(total_held(client).values()))
    with pytest.raises(ArithmeticError):
        sum(tg.map(lambda x: Bad.apply(x).sum(), [x, x], over="threads")).backward()


def test_a_worker_that_is_lost_between_forward_and_backward(fresh):
    client = fresh(n_workers=2)
    x = torch.ones(2, requires_grad=True)
    losses = tg.map(lambda x: (x**2).sum(), [x, x], eager_grad=False, client=client)
    client.restart_workers(sorted(client.nthreads())[:1], timeout=60)  # asked of the scheduler
    with pytest.raises(tg.WorkerLostError, match="again"):
        sum(losses).backward()
    found = tg.map(lambda x: (x**2).sum(), [x, x], client=client)  # on the workers there are
    sum(found).backward()
    assert x.grad.tolist() == [4, 4]


@pytest.mark.parametrize("over", MODES)
def test_bad_arguments(client, over):
    run = functools.partial(tg.map, over=over, client=client)
    with pytest.raises(TypeError, match="takes a function.*got int"):
        run(3, [1])
    with pytest.raises(TypeError, match="at least one iterable"):
        run(abs)
    with pytest.raises(TypeError, match="not iterable"):
        run(abs, 3)
    with pytest.raises(ValueError, match="chunksize is at least 1; got 0"):
        run(abs, [1], chunksize=0)
    with pytest.raises(TypeError, match="chunksize is a whole number; got 1.5"):
        run(abs, [1], chunksize=1.5)
    with pytest.raises(TypeError, match="seed is a whole number; got 'a'"):
        run(abs, [1], seed="a")
    with pytest.raises(ValueError, match="reduce is one of 'sum', 'mean'|reduce is one of None"):
        run(abs, [1], reduce="max")
    with pytest.raises(ValueError, match="eager_grad is one of"):
        run(abs, [1], eager_grad=1)
    with pytest.raises(ValueError, match="over is one of 'processes', 'threads', 'both'; got"):
        tg.map(abs, [1], over="proceses", client=client)


def test_what_cannot_be_sent(client):
    lock = threading.Lock()

    def locked(x):
        with lock:
            return x.sum()

    with pytest.raises(TypeError, match="'locked' cannot be sent to a worker.*pickle"):
        tg.map(locked, torch.ones(2, 2), client=client)
    with pytest.raises(TypeError, match="item 1 of the map of 'str' cannot be sent"):
        tg.map(str, [1, lock, 3], client=client)
    assert tg.map(locked, torch.ones(2, 2), over="threads") == [torch.tensor(2.0)] * 2
    sparse = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises(TypeError, match="closes over a Tensor of layout torch.sparse_coo"):
        tg.map(lambda x: (sparse @ x).sum(), [torch.ones(3, 1)], client=client)


def test_buffers_that_change_on_workers_are_refused(client):
    norm = nn.BatchNorm1d(2)
    xs = [torch.randn(4, 2) for _ in range(4)]
    with pytest.raises(tg.TaskgradError, match="changed a buffer.*evaluation mode"):
        tg.map(norm, xs, client=client)
    norm.eval()
    for a, b in zip(tg.map(norm, xs, client=client), map(norm, xs), strict=True):
        assert_same(a.detach(), b.detach())


# -- what travels ----------------------------------------------------------------------------------


def payloads(monkeypatch) -> dict[str, int]:
    """Bytes that go out with each task submitted from now on, by key."""
    from taskgrad.executors import futures

    sizes: dict[str, int] = {}
    lower = futures.lower

    def weighed(*args, **kwargs):
        graph = lower(*args, **kwargs)
        for layer in graph.layers.values():
            for key, task in layer.items():
                sizes[key] = len(task.args[0])
        return graph

    monkeypatch.setattr(futures, "lower", weighed)
    return sizes


@pytest.mark.parametrize("width", [100, 600])  # below and above what is sent ahead of the tasks
def test_what_it_closes_over_is_sent_once_a_worker(client, monkeypatch, width):
    w = torch.ones(width, width, requires_grad=True)
    sizes = payloads(monkeypatch)
    losses = tg.map(
        lambda i: (w * i).sum(), range(12), chunksize=1, eager_grad=False, client=client
    )
    chunks = [size for key, size in sizes.items() if key.startswith("map:")]
    assert len(chunks) == 12
    assert max(chunks) < 4000
    assert sum(sizes.values()) < 2 * w.numel() * 4 + 12 * 4000
    sizes.clear()
    sum(losses).backward()
    assert len(sizes) == 2  # one task a worker
    assert max(sizes.values()) < 2000
    assert w.grad[0, 0] == sum(range(12))


def test_cut_and_share():
    assert cut(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert [len(r) for r in share(9, [3, 3])] == [5, 4]
    assert [len(r) for r in share(10, [4, 1])] == [8, 2]
    assert [len(r) for r in share(2, [1, 1, 1])] == [1, 1, 0]
    for count, weights in itertools.product(range(20), ([1], [1, 2, 3], [5, 1, 1])):
        ranges = share(count, weights)
        assert [i for r in ranges for i in r] == list(range(count))
