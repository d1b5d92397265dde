"""pmap and its collectives beside JAX's own, forward and backward; JAX runs in another process."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import taskgrad as tg
from spmd_cases import CASES, EXAMPLES, QUICK, QUICK_SEVERAL, SEVERAL, SHAPES, inputs

TESTS = Path(__file__).parent


def value_and_grad(fn):
    both = torch.func.grad_and_value(fn)
    return lambda *args: both(*args)[::-1]


NAMES = ("psum", "pmean", "pmax", "pmin", "all_gather", "psum_scatter", "all_to_all", "ppermute")
NAMES += ("pshuffle", "pswapaxes", "pbroadcast", "axis_index", "axis_size", "pmap")
ON = SimpleNamespace(
    **{name: getattr(tg, name) for name in NAMES},
    **{name: getattr(torch.func, name) for name in ("grad", "vmap", "jvp", "jacrev", "jacfwd")},
    value_and_grad=value_and_grad,
    sin=torch.sin,
    dot=torch.matmul,
    stack=torch.stack,
    array=torch.from_numpy,
)


def run_jax(path, which):
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "jax_reference.py"), str(path), which],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return run_jax(tmp_path_factory.mktemp("jax") / "some", "quick")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run_jax(tmp_path_factory.mktemp("jax") / "every", "all")


@pytest.fixture(scope="module", params=[1, 2, 3])
def workers(request):
    client = tg.local_cluster(n_workers=request.param, dashboard_address=":0")
    yield client
    client.close()


def compare(mapped, shape, case, expected):
    """A map's results and gradients with JAX's: (results, gradients or None)."""
    x = torch.from_numpy(inputs(shape)).requires_grad_(case.differentiable)
    out = mapped(x)
    torch.testing.assert_close(out.detach(), torch.from_numpy(expected[0]), check_dtype=False)
    if case.differentiable:
        out.backward(torch.from_numpy(inputs(out.shape)))
        torch.testing.assert_close(x.grad, torch.from_numpy(expected[1]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_its_documentation(client, some, name):
    for ours, theirs in zip(EXAMPLES[name](ON), some[name], strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs.copy()))


@pytest.mark.parametrize("name", QUICK)
def test_eight_ranks_on_two_workers(client, some, name):
    case = CASES[name]
    mapped = tg.pmap(case.write(ON, 8), axis_name="i", client=client)
    compare(mapped, (8, *case.shape(8)), case, some[name, 8])


def composed(fn, client):
    return tg.pmap(tg.pmap(fn, "j"), "i", client=client)


def inside(fn, client):
    """The inner map is called in a rank of the outer one."""
    return tg.pmap(lambda x: tg.pmap(fn, "j")(x), "i", client=client)


@pytest.mark.parametrize("nest", [composed, inside])
@pytest.mark.parametrize("name", QUICK_SEVERAL)
def test_two_axes_on_two_workers(client, some, name, nest):
    case = SEVERAL[name]
    shape = SHAPES[0]
    mapped = nest(case.write(ON, 8), client)
    compare(mapped, (*shape, *case.shape(8)), case, some[name, shape])


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_collective(workers, every, name):
    case = CASES[name]
    for n in case.sizes:
        mapped = tg.pmap(case.write(ON, n), axis_name="i", client=workers)
        compare(mapped, (n, *case.shape(n)), case, every[name, n])


@pytest.mark.long
@pytest.mark.parametrize("nest", [composed, inside])
@pytest.mark.parametrize("name", SEVERAL)
def test_every_collective_over_two_axes(workers, every, name, nest):
    case = SEVERAL[name]
    for shape in SHAPES:
        n = shape[0] * shape[1]
        mapped = nest(case.write(ON, n), workers)
        compare(mapped, (*shape, *case.shape(n)), case, every[name, shape])


def test_the_nested_example_of_its_documentation(client):
    """Its numbers are in the documentation; JAX 0.10.2 nests no pmaps any more."""

    @functools.partial(tg.pmap, axis_name="rows")
    @functools.partial(tg.pmap, axis_name="cols")
    def normalize(x):
        return x / tg.psum(x, "rows"), x / tg.psum(x, "cols"), x / tg.psum(x, ("rows", "cols"))

    x = torch.arange(8.0).reshape(4, 2)
    rows, columns, both = normalize(x)
    torch.testing.assert_close(rows.sum(0), torch.ones(2))
    torch.testing.assert_close(columns.sum(1), torch.ones(4))
    torch.testing.assert_close(both.sum(), torch.tensor(1.0))
    torch.testing.assert_close(both, x / x.sum())
