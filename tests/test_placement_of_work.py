"""Where work runs and what travels, read from the scheduler's and the workers' own records."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import taskgrad as tg
from conftest import ran_on
from helpers import long

CUT = 256 * 1024 * 4  # bytes of the one activation at the cut


def transfers(client):
    """What came to each worker from another, by wire or memory; of the last thousand transfers."""
    return client.run(lambda dask_worker: [dict(e) for e in dask_worker.transfer_incoming_log])


@pytest.fixture
def wide():
    """Big weights (4 MiB each), a cut of 1 MiB."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh())
    return model, torch.randn(256, 1024)


@pytest.mark.parametrize("how", ["vjp", *long("backward", "bridge")])
def test_only_the_cut_travels(client, wide, how):
    model, x = wide
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1, 1])
    before = transfers(client)
    if how == "vjp":
        y, back = tg.vjp(chain, x)
        tg.collect(y)
        tg.collect(back(torch.ones(256, 1024)))
    elif how == "backward":
        tg.spawn(torch.sum, chain(x)).backward()
    else:
        tg.collect(chain(x)).sum().backward()
    new = [e for w, log in transfers(client).items() for e in log if e not in before[w]]
    moved = sum(e["total"] for e in new)
    assert 2 * CUT <= moved <= 2 * CUT * 1.1, [e["keys"] for e in new]


def test_every_backward_runs_where_its_forward_left_its_tape(client):
    model = nn.Sequential(
        nn.Linear(3, 3),
        tg.Parallel(torch.add, nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3))),
        nn.Linear(3, 3),
    )
    chain = tg.GraphChain(model, client=client, placement=[0, 1, 0, 1, 0, 1])
    before = ran_on(client, "")
    y = tg.spawn(torch.sum, chain(torch.randn(2, 3)) * tg.spawn(torch.exp, torch.ones(3)), worker=0)
    y.backward()
    done = ran_on(client, "") - before
    forward = {k.partition("-")[0].partition(":")[2]: w for k, w in done if k[:8] == "forward:"}
    backward = {k.partition("-")[0].partition(":")[2]: w for k, w in done if k[:9] == "backward:"}
    assert backward
    assert len(set(backward.values())) == 2
    for name, worker in backward.items():
        assert forward[name] == worker, name


def test_round_robin_and_names_and_addresses(client):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    robin = tg.GraphChain(model, client=client, placement="round_robin").placement.column("worker")
    assert robin[0] == robin[2] != robin[1] == robin[3]
    by_address = tg.GraphChain(model, client=client, placement=robin)
    assert by_address.placement.column("worker") == robin
    by_name = tg.GraphChain(model, client=client, placement=["1", "0", 1, 0])
    assert by_name.placement.column("worker") == [robin[1], robin[0], robin[1], robin[0]]


def test_default_placement_is_contiguous_and_balanced(client):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    workers = tg.GraphChain(model, client=client).placement.column("worker")
    assert workers == [workers[0]] * 4 + [workers[-1]] * 4


@pytest.mark.parametrize(
    ("options", "runs", "workers"),
    [
        ({"stages_per_worker": 2}, [(0, 1), (2, 3), (4, 5), (6, 7)], [0, 1, 0, 1]),
        ({"placement": "v"}, [(0, 1), (2, 3), (4, 5), (6, 7)], [0, 1, 1, 0]),
        ({"stages_per_worker": 9}, [(i,) for i in range(8)], [0, 1] * 4),  # more than layers
    ],
)
def test_several_stages_a_worker(client, options, runs, workers):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    chain = tg.GraphChain(model, client=client, **options)
    trainer = tg.Trainer(chain, nn.functional.mse_loss, partial(torch.optim.SGD, lr=0.1))
    assert [stage.layers for stage in trainer.plan.stages] == runs
    assert [stage.worker for stage in trainer.plan.stages] == workers
    x = torch.randn(3, 8)
    assert torch.equal(tg.collect(chain(x)), model(x))


def test_several_stages_a_worker_are_for_the_automatic_placement(client):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    with pytest.raises(tg.PlacementError, match="is for placement=None.*got placement='v'"):
        tg.GraphChain(model, client=client, placement="v", stages_per_worker=2)
    with pytest.raises(tg.PlacementError, match="is for placement=None"):
        tg.GraphChain(model, client=client, placement=[0, 0, 1], stages_per_worker=2)
    with pytest.raises(ValueError, match="stages_per_worker is at least 1; got 0"):
        tg.GraphChain(model, client=client, stages_per_worker=0)
    with pytest.raises(TypeError, match="stages_per_worker is a whole number"):
        tg.GraphChain(model, client=client, stages_per_worker=1.5)


def test_placement_table(client):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    table = tg.GraphChain(model, client=client).placement
    assert (table[0].parameters, table[0].bytes, table[0].device) == (9, 36, "cpu")
    assert (table[1].parameters, table[1].bytes) == (6, 6 * 4 + 2 * 3 * 4 + 8)
    text = repr(table).splitlines()
    columns = ["layer", "kind", "worker", "device", "parameters", "bytes", "activations", "share"]
    assert text[0].split() == columns
    assert len({len(line) for line in text[:-1]}) == 1
    assert "<table>" in table._repr_html_()
