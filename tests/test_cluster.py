"""Clusters: one of our own, one that we are handed, other shapes of workers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn

import taskgrad as tg
from helpers import assert_same, assert_vjp_equals_torch, long


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_no_client_anywhere_opens_one_and_says_so_once():
    done = run_script(
        """
        import torch, taskgrad as tg
        if __name__ == "__main__":
            chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 1)))
            print(tg.collect(chain(torch.ones(3, 2))).shape)
            other = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 1)))
            print(tg.spawn(torch.sum, torch.ones(2)).compute())
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["torch.Size([3, 1])", "tensor(2.)"]
    assert done.stderr.count("started a local cluster") == 1


@pytest.mark.parametrize("first", ["dask", *long("taskgrad", "distributed")])
def test_imports_in_any_order_and_dask_alone_stays_light(first):
    done = run_script(
        f"""
        import sys, {first}
        assert "torch" not in sys.modules
        import dask, distributed, taskgrad
        taskgrad.GraphChain
        """
    )
    assert done.returncode == 0, done.stderr


def test_workers_in_this_process_and_several_threads():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as own,
        Client(own) as client,
    ):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(True), nn.BatchNorm1d(3), nn.Linear(3, 2))
        chain = tg.GraphChain(model, client=client, placement=[0, 1, 1, 0])
        assert_vjp_equals_torch(chain, model, torch.randn(4, 3))


def test_two_clients_of_one_cluster(client):
    model = nn.Sequential(nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=client)
    with Client(client.scheduler.address) as other:
        second = tg.GraphChain(model, client=other)
        x = torch.ones(1, 2)
        assert_same(tg.collect(chain(x)).detach(), tg.collect(second(x)).detach())
        with pytest.raises(tg.TaskgradError, match="two clients"):
            tg.collect([chain(x), second(x)])
        with pytest.raises(tg.TaskgradError, match="two clients"):
            tg.spawn(torch.add, chain(x), second(x))
    assert tg.collect(chain(torch.ones(1, 2))).shape == (1, 2)


def test_a_worker_that_joins_late_is_used(fresh):
    client = fresh(n_workers=1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    chain = tg.GraphChain(model, client=client)
    client.cluster.scale(2)
    client.wait_for_workers(2, timeout=200)
    spread = tg.GraphChain(model, client=client, placement=[0, 1])
    assert len(set(spread.placement.column("worker"))) == 2
    x = torch.ones(1, 2)
    assert_same(tg.collect(spread(x)).detach(), tg.collect(chain(x)).detach())


def test_worker_processes_of_several_threads(fresh):
    """Many calls at once on stages that several threads run."""
    client = fresh(n_workers=2, threads_per_worker=4)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    xs = [torch.randn(5, 8, requires_grad=True) for _ in range(40)]
    ys = [chain(x) for x in xs]
    cotangent = torch.randn(5, 4)
    grads = torch.autograd.grad(tg.collect(ys), xs, [cotangent] * len(xs))
    for x, y, grad in zip(xs, ys, grads, strict=True):
        assert_same(tg.collect(y).detach(), model(x).detach())
        assert_same(grad, torch.autograd.grad(model(x), x, cotangent)[0])
