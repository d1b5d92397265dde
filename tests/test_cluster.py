"""Clusters: one of our own, one that we are handed, other shapes of workers; the wire."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client, LocalCluster
from distributed.protocol import deserialize, serialize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from helpers import assert_same, assert_vjp_equals_torch
from taskgrad.cluster import serialize as _family  # noqa: F401  registers it


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
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


@pytest.mark.parametrize("first", ["dask", "taskgrad", "distributed"])
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
    client.wait_for_workers(2, timeout=60)
    spread = tg.GraphChain(model, client=client, placement=[0, 1])
    assert len(set(spread.placement.column("worker"))) == 2
    x = torch.ones(1, 2)
    assert_same(tg.collect(spread(x)).detach(), tg.collect(chain(x)).detach())


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int64),
]


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    requires_grad=st.booleans(),
)
def test_tensors_survive_the_wire_bit_for_bit(dtype, shape, layout, requires_grad):
    t = (torch.randn(shape) * 10).to(dtype)
    if layout == "transposed":
        t = t.permute(list(reversed(range(t.dim()))))
    elif layout == "strided" and t.dim():
        t = t[::2]
    elif layout == "expanded":
        t = t.unsqueeze(0).expand(3, *t.shape)
    if t.is_floating_point() and requires_grad and dtype.itemsize > 1:
        t = t.detach().requires_grad_()
    back = deserialize(*serialize(t))
    assert back.dtype == t.dtype
    assert back.shape == t.shape
    assert back.requires_grad == t.requires_grad
    assert torch.equal(bits(back), bits(t))
    if layout == "transposed" and t.numel() > 1:
        sizes = [(s, n) for s, n in zip(back.stride(), t.shape, strict=True) if n > 1]
        assert sizes == [(s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8) if t.numel() else t.detach().byte()


def test_conjugate_and_negative_views_and_parameters():
    z = torch.randn(3, dtype=torch.complex64)
    for t in (z.conj(), z.conj().imag, nn.Parameter(torch.randn(2))):
        back = deserialize(*serialize(t))
        assert torch.equal(back, t)
        assert type(back) is type(t)


def test_sizes_are_true():
    t = torch.zeros(1000, 1000)
    assert 4_000_000 <= sizeof(t) < 4_001_000
    assert 4_000 <= sizeof(t[0]) < 5_000
    assert sizeof([t, t[0]]) >= 4_004_000
