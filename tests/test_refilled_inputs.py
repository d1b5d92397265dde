"""An input is what it was when it was given, whatever its maker writes into that memory later."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import LocalCluster
from torch import nn

import taskgrad as tg
from helpers import assert_same

ROWS, WIDTH = 16, 2048  # 128 KiB a batch


class Held:
    """An object with a buffer."""

    def __init__(self, buffer):
        self.buffer = buffer


MAKERS = {
    "numpy": (lambda: np.empty(3), lambda item: item),
    "torch": (lambda: torch.empty(3), lambda item: item),
    "dict": (lambda: {"x": np.empty(3)}, lambda item: item["x"]),
    "object": (lambda: Held(torch.empty(3)), lambda item: item.buffer),
    "object of an array": (lambda: Held(np.empty(3)), lambda item: item.buffer),
    "read-only view": (lambda: _view(np.empty(1 << 16)), lambda item: item),
}


def _view(array):
    view = array[:]
    view.flags.writeable = False
    return view


def refills(make, get):
    item = make()
    for i in range(5):
        buffer = get(item)
        buffer = buffer if getattr(buffer, "base", None) is None else buffer.base
        buffer[:] = i
        yield item


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("over", ["processes", "threads", "imap"])
def test_items_of_a_generator_that_refills_its_buffer(client, kind, over):
    make, get = MAKERS[kind]

    def first(item):
        return float(get(item)[0])

    if over == "imap":
        found = list(tg.imap(first, refills(make, get)))
    else:
        found = tg.map(first, refills(make, get), over=over)
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_objects_that_a_generator_makes_are_the_callers_own_in_threads(client):
    made = [Held(torch.zeros(2)) for _ in range(3)]

    def write(held):
        held.buffer.add_(1)
        held.seen = True

    tg.map(write, (held for held in made), over="threads")
    assert all(held.seen and held.buffer.sum() == 2 for held in made)


def test_a_function_that_closes_over_an_array_keeps_it_as_it_was(client):
    array = np.zeros(1 << 16)
    stream = tg.imap(lambda i: float(array.sum()) + i, range(3))
    first = next(stream)
    array[:] = 1
    assert [first, *stream] == [0.0, 1.0, 2.0]


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def model():
    torch.manual_seed(0)
    return nn.Sequential(Slow(), nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1))


SGD = functools.partial(torch.optim.SGD, lr=0.01)


class Loader:
    """One buffer for all batches."""

    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        x, t = np.empty((ROWS, WIDTH), np.float32), np.empty((ROWS, 1), np.float32)
        for step in range(3):
            generator = np.random.default_rng(step)
            x[:] = generator.standard_normal(x.shape, np.float32)
            t[:] = generator.standard_normal(t.shape, np.float32)
            yield (x, t) if self.kind == "numpy" else (torch.from_numpy(x), torch.from_numpy(t))


def expected_weights():
    plain = model()
    optimizer = SGD(plain.parameters())
    for x, t in Loader("torch"):
        for part, target in zip(x.tensor_split(2), t.tensor_split(2), strict=True):
            (F.mse_loss(plain(part), target) * 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain.state_dict()


@pytest.fixture(scope="module")
def inside():
    """A cluster in this process, where nothing is pickled."""
    cluster = LocalCluster(
        n_workers=2, processes=False, threads_per_worker=1, dashboard_address=None
    )
    with cluster, cluster.get_client() as client:
        yield client


@pytest.fixture(params=["processes", "inside"])
def either(request):
    client = request.getfixturevalue("client" if request.param == "processes" else "inside")
    with client.as_current():
        yield client


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_loader_that_refills_its_batch(either, kind):
    chain = tg.GraphChain(model(), placement=[0, 0, 1, 1])
    tg.Trainer(chain, F.mse_loss, SGD, microbatches=2).fit(Loader(kind), progress=False)
    state = chain.state_dict()
    for name, value in expected_weights().items():
        assert_same(state[name], value, name)


def test_a_lazy_call_takes_what_was_there(either):
    """Torch does not count what NumPy writes."""
    array = np.ones(300_000)
    x = torch.from_numpy(array)
    y = tg.spawn(torch.sum, x * 1 + 0) + tg.spawn(torch.sum, x) + tg.spawn(np.sum, array)
    z = tg.GraphChain(nn.Sequential(nn.Identity()))({"x": [x]})
    _, back = tg.vjp(lambda x: tg.spawn(torch.mul, x, x), x)
    _, gx = back(x)
    array[:] = 7
    assert tg.collect(y).item() == 900_000
    assert tg.collect(z)["x"][0].sum() == 300_000
    assert tg.collect(gx).sum() == 600_000


def test_predictions_of_a_loader_that_refills_its_batch(either):
    chain = tg.GraphChain(model(), placement=[0, 0, 1, 1])
    trainer = tg.Trainer(chain, F.mse_loss, SGD)
    with torch.no_grad():
        plain = [model()(x).clone() for x, _ in Loader("torch")]
    found = list(trainer.predict(x for x, _ in Loader("numpy")))
    for ours, theirs in zip(found, plain, strict=True):
        assert_same(ours, theirs)


def test_what_is_written_into_a_result_stays_with_the_driver(inside):
    with inside.as_current(), torch.no_grad():
        y = tg.spawn(torch.add, torch.ones(3), 1)
        tg.collect(y).zero_()
        assert_same(tg.collect(y * 1), torch.full((3,), 2.0))


def test_parameters_that_a_generator_gives_take_gradients(client):
    model = nn.Linear(3, 2)
    for over in ("processes", "threads"):
        model.zero_grad()
        sum(tg.map(torch.sum, (p for p in model.parameters()), over=over)).backward()
        assert all(p.grad.eq(1).all() for p in model.parameters())
        made = (2 * p for p in model.parameters())
        sum(tg.map(torch.sum, made, over=over)).backward()
        assert all(p.grad.eq(3).all() for p in model.parameters())
