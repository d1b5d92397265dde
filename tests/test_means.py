"""Every mean is over what its documentation says, whatever the dtype."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg

pytestmark = pytest.mark.usefixtures("executor")

SGD = partial(torch.optim.SGD, lr=0.1)


class Keep(nn.Module):
    """An autoencoder's whole: what came out, and what went in. Takes what `picked` picks."""

    def __init__(self, picked=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 6))
        self.picked = picked

    def forward(self, x):
        x = x if self.picked is None else self.picked(x)
        return self.inner(x), x


def reconstruction(output, _, reduction="mean"):
    found, x = output
    return F.mse_loss(found, x, reduction=reduction)


def first(batch):
    return batch["x"]


def turned(batch):
    return batch["x"].T * batch["scale"]


def one(x):
    return x


SIZES = [8, 2, 3]


def parts():
    torch.manual_seed(1)
    return [(i + 1) * torch.randn(n, 6) for i, n in enumerate(SIZES)]


def on_a_worker(x):
    return tg.spawn(torch.clone, x, worker=0)


@pytest.mark.parametrize(
    ("picked", "given", "targets", "dims"),
    [
        (None, one, lambda x: None, {}),
        (None, np.asarray, lambda x: None, {}),
        (first, lambda x: {"x": x, "name": "a"}, lambda x: {"y": None}, {}),
        (None, one, lambda x: torch.tensor(1.0), {"target_dims": None}),
        (None, one, lambda x: (torch.ones(3), None), {"target_dims": (None, None)}),
        (
            turned,
            lambda x: {"x": x.T, "scale": torch.ones(6)},
            lambda x: None,
            {"in_dims": {"x": 1, "scale": None}},
        ),
        (None, on_a_worker, lambda x: None, {}),
    ],
)
def test_evaluate_weighs_batches_by_samples_with_or_without_targets(
    client, picked, given, targets, dims
):
    xs = parts()
    model = Keep(picked)
    with torch.no_grad():
        losses = [reconstruction(model(given(x) if picked else x), None).item() for x in xs]
    expected = sum(of * n for of, n in zip(losses, SIZES, strict=True)) / sum(SIZES)
    chain = tg.GraphChain(nn.Sequential(nn.Identity(), model), placement=[0, 1])
    trainer = tg.Trainer(chain, reconstruction, SGD, microbatches=2, **dims)
    batches = [(given(x), targets(x)) for x in xs]
    found = trainer.evaluate(batches, {"again": reconstruction})
    assert found == pytest.approx({"loss": expected, "again": expected})


def test_evaluate_of_a_batch_without_samples_or_whose_number_nothing_says(client):
    chain = tg.GraphChain(nn.Sequential(nn.Identity(), Keep()), placement=[0, 1])
    trainer = tg.Trainer(chain, reconstruction, SGD)
    with pytest.raises(tg.LayerError, match="the batch is empty"):
        trainer.evaluate([(torch.ones(0, 6), torch.ones(0, 6))])
    trainer = tg.Trainer(chain, reconstruction, SGD, in_dims=None)
    with pytest.raises(tg.LayerError, match="in_dims names no dimension"):
        trainer.evaluate([(torch.ones(2, 6), None)])


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")]
)
def test_a_loss_that_is_a_sum_is_divided_by_all_samples(client, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    batches = [(x, x[:, :1]) for x in parts()]
    with torch.no_grad():
        total = sum(F.mse_loss(model(x), t, reduction="sum").item() for x, t in batches)
    still = partial(torch.optim.SGD, lr=0.0)
    trainer = tg.Trainer(tg.GraphChain(model, placement=[0, 1]), loss, still, microbatches=2)
    assert trainer.evaluate(batches)["loss"] == pytest.approx(total / sum(SIZES))
    [found] = trainer.fit(batches, progress=False)
    assert found["loss"] == pytest.approx(total / sum(SIZES))


def test_an_epochs_mean_of_batches_here_and_on_workers(client):
    """The number of samples of some is not known: each batch counts the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    batches = [(x, x[:, :1]) for x in parts()]
    with torch.no_grad():
        losses = [F.mse_loss(model(x), t).item() for x, t in batches]
    batches[1] = tuple(map(on_a_worker, batches[1]))
    still = partial(torch.optim.SGD, lr=0.0)
    trainer = tg.Trainer(tg.GraphChain(model, placement=[0, 1]), F.mse_loss, still)
    [found] = trainer.fit(batches, progress=False)
    assert found["loss"] == pytest.approx(sum(losses) / 3)


def test_the_loss_of_many_microbatches_in_half_precision(client):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1)).bfloat16()
    x, t = torch.randn(128, 6).bfloat16(), torch.randn(128, 1).bfloat16()
    still = partial(torch.optim.SGD, lr=0.0)
    chain = tg.GraphChain(model, placement=[0, 1])
    trainer = tg.Trainer(chain, F.mse_loss, still, microbatches=64)
    with torch.no_grad():
        losses = [F.mse_loss(model(a), b) for a, b in zip(x.split(2), t.split(2), strict=True)]
    expected = torch.stack(losses).double().mean().item()
    assert trainer.step(x, t).item() == pytest.approx(expected, rel=1e-5)


# -- reduce= ---------------------------------------------------------------------------------------

FLOATS = [1.5, 2.25, -3.0, 7.0, 1e-3, 100.0, 5.5, 6.0, 0.25]


def values(kind):
    """Nine results, and what torch makes of them stacked."""
    if kind == "bool":
        return [torch.tensor(x > 0) for x in FLOATS]
    if kind in ("uint8", "int8", "int16", "int32", "int64"):
        large = {"uint8": 200, "int8": 100, "int16": 30_000, "int32": 2**31 - 1}.get(kind, 7)
        return [torch.full((2,), large, dtype=getattr(torch, kind)) for _ in FLOATS]
    if kind == "large float16":  # whose sum is too large for it, and whose mean is not
        return [torch.full((2,), 50_000, dtype=torch.float16) for _ in FLOATS]
    return [torch.tensor([x, -x], dtype=getattr(torch, kind)) for x in FLOATS]


@pytest.mark.parametrize("over", ["processes", "threads"])
def test_sums_and_means_are_torchs_for_every_dtype(client, over):
    kinds = ["bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16"]
    for kind in [*kinds, "large float16", "float32", "float64", "complex64"]:
        items = values(kind)
        run = partial(tg.map, torch.clone, items, over=over, chunksize=2, client=client)
        stacked = torch.stack(items)
        total = run(reduce="sum")
        expected = stacked.sum(0)
        assert total.dtype == expected.dtype, kind
        torch.testing.assert_close(total, expected, msg=kind)
        mean = run(reduce="mean")
        real = stacked.is_floating_point() or stacked.is_complex()
        expected = stacked.mean(0) if real else stacked.sum(0) / 9
        assert mean.dtype == expected.dtype, kind
        torch.testing.assert_close(mean, expected, msg=kind)


@pytest.mark.parametrize("over", ["processes", "threads"])
@pytest.mark.parametrize("chunksize", [1, 5])
def test_sums_and_means_of_numbers(client, over, chunksize):
    def found(x):
        return {"a": x > 2, "b": (x, float(x), x * 1j), "c": np.bool_(x > 2), "d": np.int8(100)}

    run = partial(tg.map, found, range(1, 6), over=over, chunksize=chunksize, client=client)
    assert run(reduce="sum") == {"a": 3, "b": (15, 15.0, 15j), "c": 3, "d": 500}
    assert run(reduce="mean") == {"a": 0.6, "b": (3.0, 3.0, 3j), "c": 0.6, "d": 100}
    assert tg.map(found, [3], over=over, reduce="sum", client=client)["a"] == 1


@pytest.mark.parametrize("over", ["processes", "threads"])
@pytest.mark.parametrize("given", [None, "text", [1, None], np.ones(2)])
def test_what_cannot_be_added_up(client, over, given):
    with pytest.raises(TypeError, match="adds up tensors and numbers"):
        tg.map(lambda x: given, range(3), over=over, reduce="mean", client=client)


@pytest.mark.parametrize("eager", [None, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_gradients_through_a_mean_in_half_precision(client, eager, pairs):
    xs = [torch.tensor(x, dtype=torch.bfloat16) for x in FLOATS]

    def loss(x, w):
        return ((w * x).square(), x > 0) if pairs else (w * x).square()

    w = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    found = tg.map(partial(loss, w=w), xs, reduce="mean", eager_grad=eager, client=client)
    value = found[0] if pairs else found
    assert value.dtype == torch.bfloat16
    if pairs:
        assert found[1] == pytest.approx(8 / 9)
    value.backward()
    theirs = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    torch.stack([(theirs * x).square() for x in xs]).mean().backward()
    torch.testing.assert_close(w.grad, theirs.grad, rtol=0.02, atol=0)
