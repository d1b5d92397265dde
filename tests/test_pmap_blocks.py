"""Calls of a pmap with several ranks on a worker, which run side by side in its program."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

import taskgrad as tg
from conftest import keys_of, wait_for_another, wait_until
from test_pmap_failures import empty

X = torch.arange(15.0).reshape(5, 3)


def test_no_task_a_call(client):
    f = tg.pmap(lambda x: tg.psum(x, "i") * tg.axis_index("i"), "i", client=client)
    before = keys_of(client, "forward")
    for i in range(5):
        total = X[0] + i
        for x in X[1:]:
            total = total + (x + i)
        found = f(X + i)
        for rank in range(5):
            assert torch.equal(found[rank], total * rank)
    assert keys_of(client, "forward") == before
    assert wait_until(lambda: empty(client))


def test_random_numbers_are_those_of_the_ranks(client, fresh):
    def draw(x):
        return torch.rand(3) + 0 * x

    torch.manual_seed(3)
    here = tg.pmap(draw, client=client)(X)
    torch.manual_seed(3)
    there = tg.pmap(draw, client=fresh(n_workers=3))(X)
    assert torch.equal(here, there)
    assert len({tuple(row.tolist()) for row in here}) == 5


def test_settings_of_torch_hold_in_each(client):
    def f(x):
        return torch.tensor(float(torch.is_grad_enabled())), torch.get_num_threads() + 0 * x[0]

    with torch.no_grad():
        assert not tg.pmap(f, client=client)(X)[0].any()
    assert tg.pmap(f, client=client)(X)[0].all()


@pytest.mark.parametrize("before", [True, False])
def test_the_next_call_after_one_that_failed(client, before):
    def f(x, fails):
        if not before:
            x = tg.psum(x, "i")
        if fails and tg.axis_index("i") == 3:
            raise KeyError("boo")
        return tg.psum(x, "i") if before else x

    call = tg.pmap(f, "i", in_axes=(0, None), client=client)
    for _ in range(3):
        with pytest.raises(tg.LayerError, match="rank 3 of f") as raised:
            call(X, True)
        assert isinstance(raised.value.__cause__, KeyError)
        assert torch.equal(call(X, False)[1], X.sum(0))
    raised.value.__traceback__ = None
    del raised
    assert wait_until(lambda: empty(client))


def test_a_task_runs_while_ranks_wait_for_it(client, tmp_path):
    """The program's thread goes back to its worker."""
    path = str(tmp_path / "made")

    def f(x):
        end = time.monotonic() + 30
        while not os.path.exists(path):
            if time.monotonic() > end:
                raise TimeoutError("nobody made it")
            time.sleep(0.01)
        return x

    def make():
        open(path, "w").close()

    found = []
    thread = threading.Thread(target=lambda: found.append(tg.pmap(f, client=client)(X)))
    thread.start()
    time.sleep(1)
    worker = next(iter(client.nthreads()))
    client.submit(make, workers=[worker], pure=False).result(timeout=30)
    thread.join()
    assert torch.equal(found[0], X)


def test_a_worker_that_is_lost_is_named(fresh):
    client = fresh(n_workers=2)

    def f(x, ends):
        if ends and tg.axis_index("i") == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return tg.psum(x, "i")

    call = tg.pmap(f, "i", in_axes=(0, None), client=client)
    call(X, False)
    before = set(client.nthreads())
    with pytest.raises(tg.WorkerLostError, match=r"worker 1 \(tcp://"):
        call(X, True)
    wait_for_another(client, before)
    assert torch.equal(call(X, False)[0], X.sum(0))
