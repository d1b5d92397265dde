"""Kernels in several threads, processes and workers, and without Numba."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import torch
from torch import nn

import taskgrad as tg


def run(code, **environment):
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_eight_threads_at_once():
    fn = tg.vectorize(lambda x, y: x * y - 1)
    inputs = [
        (torch.randn(n, 7, dtype=torch.float64), torch.randn(7, n, dtype=torch.float64).t())
        for n in (3, 40, 500, 20_000)
    ] * 8
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda pair: [fn(*pair) for _ in range(5)], inputs))
    finally:
        torch.set_num_threads(before)
    for (x, y), results in zip(inputs, found, strict=True):
        assert all(torch.equal(r, x * y - 1) for r in results)


COUNT = """
import torch, taskgrad as tg
fn = tg.vectorize(lambda x: x * {constant} + 1)
fn(torch.ones(3))
print(fn.explain().kernels[0].compiled_here)
"""


@pytest.mark.long
def test_compiled_once_for_all_processes(tmp_path):
    code = COUNT.format(constant=2.5)
    found = [run(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert found == ["True", "False"]
    assert run(COUNT.format(constant=3.5), NUMBA_CACHE_DIR=str(tmp_path)) == "True"


def compiled_here(fn, x):
    fn(x)
    return fn.explain().kernels[0].compiled_here


def test_compiled_once_a_machine(client):
    """Both workers start at the same time, and one of them waits for the other."""
    constant = uuid4().int % 10**9 / 7
    fn = tg.vectorize(lambda x: x * constant)
    futures = [
        client.submit(compiled_here, fn, torch.ones(3), workers=[worker], pure=False)
        for worker in client.nthreads()
    ]
    assert sorted(client.gather(futures)) == [False, True]


def test_a_layer_of_a_chain(client):
    fn = tg.vectorize(lambda x: x if x > 0 else 0.1 * x)
    net = nn.Sequential(nn.Linear(3, 4), tg.Elementwise(fn), nn.Linear(4, 2), tg.Elementwise(fn))
    chain = tg.GraphChain(net, placement=[0, 0, 1, 1])
    x = torch.randn(5, 3, requires_grad=True)
    y, back = tg.vjp(chain, x)
    grads, gx = back(torch.ones(5, 2))
    expected = net(x)
    expected.sum().backward()
    assert torch.equal(tg.collect(y), expected)
    assert torch.equal(tg.collect(gx), x.grad)
    for name, parameter in net.named_parameters():
        assert torch.equal(tg.collect(grads[name]), parameter.grad)
    assert torch.equal(chain.to_module()(x), expected)


@pytest.mark.long
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os, torch, taskgrad as tg
torch.set_num_threads(2)
fn = tg.vectorize(lambda x: x + 1)
add = tg.vectorize(lambda a, b: a + b)
x = torch.ones(300_000)
fn(x)
add.reduce(x), add.reduce(x)  # is kept ready
child = os.fork()
if not child:
    found = fn(x)
    os._exit(0 if found[0].item() == found[-1].item() == 2 and add.reduce(x) == 300_000 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0"


@pytest.mark.long
def test_threads_of_our_own_where_torch_has_no_openmp():
    code = """
import math, torch, taskgrad as tg
from taskgrad.kernels.runtime import thread_team
torch.set_num_threads(3)
fn = tg.vectorize(lambda x, y: math.exp(x) * y)
add = tg.vectorize(lambda a, b: a + b)
x, y = torch.randn(999, 301), torch.randn(301)
found = [fn(x, y), add.reduce(x), add.scan(x)]
thread_team._openmp = lambda: None
again = [fn(x, y), add.reduce(x), add.scan(x)]
print(all(torch.equal(a, b) for a, b in zip(found, again)), thread_team._pool is not None)
print(fn.explain().calls[0].threads)
"""
    assert run(code).split() == ["True", "True", "3"]


def test_an_error_inside_a_function_reaches_the_caller():
    def positive(x):
        while x > 1.0:
            x = x / 2
        if x < 0.0:
            raise ValueError("below zero")
        return x

    fn = tg.vectorize(positive)
    x = torch.ones(200_000)
    assert torch.equal(fn(x), x)
    x[150_000] = -1.0
    with pytest.raises(ValueError, match="below zero"):
        fn(x)
    assert torch.equal(fn(x.abs()), x.abs())


@pytest.mark.parametrize("over", ["threads", "processes", "both"])
def test_inside_a_map(client, over):
    """The kernel and its derivative run where the items are; what is closed over has a gradient."""
    fn = tg.vectorize(lambda x, y: math.tanh(x) * y if x > y else x * x)
    torch.manual_seed(0)
    items = [torch.randn(5, 3, requires_grad=True) for _ in range(8)]
    row = torch.randn(3, requires_grad=True)
    leaves, cotangents = [*items, row], [torch.randn(5, 3) for _ in items]
    found = list(tg.map(lambda x: fn(x, row), items, over=over))
    expected = [fn(x, row) for x in items]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_without_numba():
    code = """
import sys
sys.modules["numba"] = None
import torch, taskgrad as tg
fn = tg.vectorize(lambda x: x * x)
layer = tg.Elementwise(fn)
try:
    layer(torch.ones(2))
except ModuleNotFoundError as error:
    print(error)
"""
    assert "Numba, which is not installed here: pip install 'taskgrad[kernels]'" in run(code)
