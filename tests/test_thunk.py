"""Thunks are Dask collections, lazy, and run once."""

from __future__ import annotations

import re
import threading

import dask
import pytest
import torch
from dask.delayed import Delayed
from distributed import Client, get_worker
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import assert_same


class Counting(nn.Module):
    """Counts its runs on the worker, in the worker's own process."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        runs = get_worker().__dict__.setdefault("taskgrad_test_runs", {})
        runs[self.name] = runs.get(self.name, 0) + 1
        return x * 2


def runs(client, name):
    counted = client.run(
        lambda dask_worker: dask_worker.__dict__.get("taskgrad_test_runs", {}).get(name, 0)
    )
    return sum(counted.values())


def test_collection_protocol(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), client=client)
    x = torch.randn(3, 2)
    y = chain(x)
    expected = chain.to_module()(x).detach()
    assert dask.is_dask_collection(y)
    assert isinstance(y, Delayed)
    assert_same(y.compute(), expected)
    assert_same(dask.compute(y, 1)[0], expected)
    assert_same(client.compute(y).result(), expected)
    (kept,) = dask.persist(y)
    assert_same(tg.collect(kept), expected)
    assert_same(dask.delayed(torch.sum)(y).compute(), expected.sum())
    assert_same(dask.delayed(lambda d: d["y"][0].sum())({"y": [y]}).compute(), expected.sum())
    assert y.visualize(engine="cytoscape", filename=None) is not None


def test_annotated_with_its_worker(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), client=client)
    graph = chain(torch.randn(3, 2)).dask
    pins = {}
    for layer in graph.layers.values():
        pins |= {key: layer.annotations["workers"](key) for key in layer}
    assert sorted(pins.values()) == sorted([w] for w in chain.placement.column("worker"))


def test_delayed_and_other_collections_as_arguments(client):
    import dask.array as da

    ones = dask.delayed(torch.ones)(3)
    assert_same(tg.collect(tg.spawn(torch.add, ones, 1)), torch.full((3,), 2.0))
    array = da.ones((4,), chunks=2)
    assert_same(tg.collect(tg.spawn(torch.from_numpy, array)), torch.ones(4, dtype=torch.float64))
    chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 1)), client=client)
    assert tg.collect(chain(ones)).shape == (1,)


def test_several_thunks_share_their_common_part(client):
    chain = tg.GraphChain(Counting("shared"), client=client)
    h = chain(torch.ones(2))
    a, b = dask.compute(h + 1, h + 2)
    assert_same(b - a, torch.ones(2))
    assert runs(client, "shared") == 1


def test_collect_runs_what_it_needs_once(client):
    chain = tg.GraphChain(Counting("collected"), client=client)
    h = chain(torch.ones(2))
    tree = tg.collect({"a": h + 1, "b": (h, 5, "text", None)})
    assert_same(tree["a"], torch.full((2,), 3.0))
    assert tree["b"][1:] == (5, "text", None)
    tg.collect(h)
    tg.collect(h * 3)
    assert runs(client, "collected") == 1


def test_collect_of_a_persisted_graph_does_not_run_it_again(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 2), Counting("persisted")), client=client)
    x = torch.ones(1, 2, requires_grad=True)
    y = chain(x).persist()
    first, second = tg.collect(y), tg.collect(y)
    assert_same(first.detach(), second.detach())
    y.backward(torch.ones(1, 2))
    assert x.grad is not None
    assert runs(client, "persisted") == 1


def test_forward_once_for_forward_and_backward(client):
    layers = [nn.Linear(3, 3), Counting("one"), nn.Linear(3, 3), Counting("two")]
    chain = tg.GraphChain(nn.Sequential(*layers), client=client, placement=[0, 0, 1, 1])
    y, back = tg.vjp(chain, torch.randn(4, 3))
    value = tg.collect(y)
    tg.collect(back(torch.ones_like(value)))
    tg.spawn(torch.sum, chain(torch.randn(4, 3))).backward()
    tg.collect(chain(torch.randn(4, 3))).sum().backward()
    assert runs(client, "one") == runs(client, "two") == 3


def test_building_submits_nothing(client):
    model = nn.Sequential(*[nn.Identity() for _ in range(1000)])
    chain = tg.GraphChain(model, client=client)
    before = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.transition_log))
    y = chain(torch.ones(2))
    after = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.transition_log))
    assert before == after
    assert repr(y).startswith("Thunk[1000](Identity, (Thunk[999](Identity, ...")
    assert_same(tg.collect(y), torch.ones(2))


def test_consecutive_layers_on_one_worker_are_one_task(client):
    model = nn.Sequential(*[nn.Identity() for _ in range(6)])
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 0, 1, 1, 0])
    assert len(chain(torch.ones(2)).dask.to_dict()) == 3


def test_keys_start_with_action_and_layer(client):
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=client, placement=[0, 1])
    optimizer = tg.Optimizer(chain, torch.optim.SGD)
    tg.spawn(nn.functional.mse_loss, chain(torch.ones(1, 2)), torch.ones(1, 2)).backward()
    optimizer.step()
    prefixes = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    assert {
        "forward:stem",
        "forward:head",
        "loss:mse_loss",
        "backward:mse_loss",
        "backward:head",
        "backward:stem",
        "update:Sequential",
    } <= set(prefixes)


def test_spawn_places_by_its_argument_and_in_turn(client):
    where = tg.spawn(lambda: get_worker().address, worker=1)
    address = tg.collect(where)
    near = tg.spawn(lambda other: get_worker().address, where)
    assert tg.collect(near) == address
    spread = [tg.spawn(lambda: get_worker().address) for _ in range(4)]
    assert len(set(tg.collect(spread))) == 2
    assert tg.collect(tg.spawn(lambda: get_worker().address, worker=address)) == address


def test_repr_and_html(client):
    y = tg.spawn(torch.relu, tg.spawn(torch.neg, torch.ones(2, 3)))
    assert repr(y) == "Thunk[2](relu, (Thunk[1](neg, (float32[2, 3],)),))"
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    chain = tg.GraphChain(model, client=client, placement=[0, 1])
    html = chain(torch.ones(1, 2))._repr_html_()
    assert "<svg" in html
    colours = set(re.findall(r"fill: (#[0-9a-f]{6})", html))
    assert {"#4c9be8", "#f2a541"} <= colours  # one for each worker
    assert "<svg" in chain._repr_html_()
    assert "Linear" in chain._repr_html_()


def test_thunks_that_are_used_like_values_say_what_to_do(client):
    y = tg.spawn(torch.neg, torch.ones(2))
    for use in (lambda: y.shape, lambda: list(y), lambda: len(y), lambda: bool(y), lambda: y()):
        with pytest.raises((AttributeError, TypeError)):
            use()
    with pytest.raises(AttributeError, match=r"tg\.collect"):
        _ = y.shape


def test_inputs_written_between_call_and_run_are_noticed(client):
    x = torch.ones(2)
    y = tg.spawn(torch.neg, x)
    x += 1
    with pytest.raises(tg.TaskgradError, match="modified in place"):
        tg.collect(y)


def test_large_inputs_go_straight_to_their_worker(client):
    x = torch.randn(1 << 20, requires_grad=True)
    y = tg.spawn(torch.sin, x, worker=0) + tg.spawn(torch.cos, x, worker=1)
    tg.collect(y).sum().backward()
    torch.testing.assert_close(x.grad, (x.cos() - x.sin()).detach())


def test_a_view_travels_without_the_rest_of_its_storage(client):
    data = torch.arange(1_000_000.0)
    graph = tg.spawn(torch.relu, data[:10], worker=0).dask
    (task,) = graph.to_dict().values()
    assert sum(len(a) for a in task.args if isinstance(a, bytes)) < 10_000
    assert_same(tg.collect(tg.spawn(torch.relu, data[:10])), data[:10])


def test_a_client_that_is_not_the_default_one(client):
    with Client(client.scheduler.address, set_as_default=False) as other:
        chain = tg.GraphChain(nn.Sequential(nn.Linear(2, 1)), client=other)
        tg.collect(chain(torch.ones(3, 2))).sum().backward()
        assert tg.collect(chain.grads())["0.bias"] == 3


def test_from_threads_and_beside_other_work(client):
    other = client.map(lambda i: i**2, range(200))
    chains = [tg.GraphChain(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), client=client) for _ in "ab"]
    modules = [c.to_module() for c in chains]
    failed = []

    def train(chain, module):
        try:
            for _ in range(10):
                x = torch.randn(4, 3)
                assert_same(tg.collect(chain(x)).detach(), module(x).detach())
                tg.spawn(torch.sum, chain(x)).backward()
                module(x).sum().backward()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=a) for a in zip(chains, modules, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failed
    for chain, module in zip(chains, modules, strict=True):
        for name, grad in tg.collect(chain.grads()).items():
            assert_same(grad, module.get_parameter(name).grad)
    assert sum(client.gather(other)) == sum(i**2 for i in range(200))


def test_nothing_is_left_when_all_is_dropped(client):
    chain = tg.GraphChain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), client=client)
    y = chain(torch.randn(2, 3))
    tg.collect(y)
    del chain, y
    assert wait_until(lambda: not any(total_held(client).values())), total_held(client)
