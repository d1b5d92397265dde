"""Messages between ranks that run as tasks, or several on a worker: over channels, if there are."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
import torch
from distributed import Client

import taskgrad as tg
from conftest import total_held, wait_for_another, wait_until
from helpers import end_rank_programs, long
from taskgrad.cluster import program_hosts
from taskgrad.cluster.session import session
from taskgrad.executors import rank_links
from test_compiled_fallback import unreachable

_MESSAGE = "taskgrad_rank_message"


def count_messages(dask_worker) -> None:
    """Count the messages that come over Dask's connections from now on."""
    stop_counting(dask_worker)
    handler = dask_worker.handlers[_MESSAGE]

    def counting(**message):
        counting.count += 1
        return handler(**message)

    counting.count, counting.handler = 0, handler
    dask_worker.handlers[_MESSAGE] = counting


def counted(dask_worker) -> int:
    return dask_worker.handlers[_MESSAGE].count


def stop_counting(dask_worker) -> None:
    found = dask_worker.handlers[_MESSAGE]
    dask_worker.handlers[_MESSAGE] = getattr(found, "handler", found)


def links(dask_worker) -> int:
    """How many links this worker has."""
    hosts = program_hosts._hosts.get(dask_worker)
    return 0 if hosts is None else sum(h.link is not None for h in hosts.named.values())


@pytest.fixture
def messages(client):
    """The number of messages over Dask's connections since the test began."""
    tg.pmap(torch.neg, client=client)(torch.ones(2))  # workers are set up by a first call
    client.run(count_messages)
    yield lambda: sum(client.run(counted).values())
    client.run(stop_counting)


@pytest.mark.parametrize("count", [5, 100_000])
@pytest.mark.parametrize("taped", [False, True], ids=["direct", "taped"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_nothing_goes_over_dask_and_nothing_is_torn(client, messages, ranks, taped, count):
    """Each rank writes to what it has sent as soon as it has the sum."""
    w = torch.randn(count, requires_grad=taped)

    def f(x):
        found = []
        x = x.clone()
        for _ in range(3):
            found.append(tg.psum(x, "i").sum())
            x.add_(1)
        return torch.stack(found), tg.psum(w * x, "i")

    x = torch.randn(ranks, count)
    sums, products = tg.pmap(f, "i", client=client)(x)
    if taped:
        products.sum().backward()
    assert messages() == 0
    expected, product = [], 0
    for _ in range(3):
        total = x[0]
        for row in x[1:]:
            total = total + row
        expected.append(total.sum())
        x = x + 1
    for row in x:
        product = product + w.detach() * row
    assert torch.equal(sums, torch.stack(expected).expand(ranks, 3))
    assert torch.equal(products[0], product)
    if taped:  # each of so many sums of all rows
        torch.testing.assert_close(w.grad, ranks * x.sum(0))


def test_without_a_link_they_go_over_dask(client, messages, monkeypatch):
    end_rank_programs(client)
    monkeypatch.setattr("taskgrad.executors.program_comms.connect", unreachable)
    w = torch.ones(3, requires_grad=True)
    found = tg.pmap(lambda x: tg.psum(w * x, "i"), "i", client=client)(torch.ones(2, 3))
    found.sum().backward()
    assert messages() > 0
    assert torch.equal(w.grad, torch.full((3,), 4.0))
    end_rank_programs(client)


def test_a_link_stays_while_a_backward_may_need_it(client):
    end_rank_programs(client)
    assert wait_until(lambda: not any(client.run(links).values()))
    w = torch.ones(3, requires_grad=True)
    f = tg.pmap(lambda x: tg.psum(w * x, "i"), "i", client=client)
    found = f(torch.ones(2, 3))
    rank_links._links[client]._links.clear()
    assert set(client.run(links).values()) == {1}
    found.sum().backward()
    assert torch.equal(w.grad, torch.full((3,), 4.0))
    del found
    assert wait_until(lambda: not any(client.run(links).values()))
    assert wait_until(lambda: not any(total_held(client).values()))


@pytest.mark.parametrize("taped", [True, *long(False)])
def test_a_worker_that_is_killed_while_others_wait_for_it(fresh, taped):
    client = fresh(n_workers=2)
    w = torch.ones(3, requires_grad=taped)

    def f(x):
        first = tg.psum(w * x, "i")
        if tg.axis_index("i") == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return tg.psum(first, "i")

    before = set(client.nthreads())
    with pytest.raises(tg.WorkerLostError, match="is gone with worker"):
        tg.pmap(f, "i", client=client)(torch.ones(4, 3))
    wait_for_another(client, before)
    again = tg.pmap(lambda x: tg.psum(w * x, "i"), "i", client=client)(torch.ones(4, 3))
    assert torch.equal(again, torch.full((4, 3), 4.0))


def break_links(dask_worker) -> None:
    """End the connections of links, as a network may."""
    for host in program_hosts._hosts[dask_worker].named.values():
        for peer in host.channels._peers.values() if host.link is not None else ():
            peer.connection.shutdown(socket.SHUT_RDWR)


def test_a_link_that_breaks_ends_the_ranks_that_wait(client, tmp_path):
    """And a next call has a new one."""
    w = torch.ones(3, requires_grad=True)
    begun = str(tmp_path / "begun")

    def f(x, waits):
        first = tg.psum(w * x, "i")
        if waits and tg.axis_index("i") == 1:
            open(begun, "w").close()
            time.sleep(3)
        return tg.psum(first, "i")

    call = tg.pmap(f, "i", in_axes=(0, None), client=client)
    assert torch.equal(call(torch.ones(2, 3), False), torch.full((2, 3), 4.0))

    def broken() -> None:
        assert wait_until(lambda: os.path.exists(begun))
        client.run(break_links, workers=[min(client.nthreads())])

    thread = threading.Thread(target=broken)
    thread.start()
    with pytest.raises(tg.TaskgradError, match="connection to worker . .* was lost"):
        call(torch.ones(2, 3), True)
    thread.join()
    assert torch.equal(call(torch.ones(2, 3), False), torch.full((2, 3), 4.0))


def test_links_are_their_clients_own(client, messages):
    """Another client's may be closed at any time."""
    end_rank_programs(client)
    second = Client(client.scheduler.address, set_as_default=False)
    w = torch.ones(3, requires_grad=True)
    tg.pmap(lambda x: tg.psum(w * x, "i"), "i", client=second)(torch.ones(2, 3))
    rank_links.links_of(session(client))._reachable._not.update(
        rank_links.links_of(session(second))._links
    )
    before = messages()
    tg.pmap(lambda x: tg.psum(w * x, "i"), "i", client=client)(torch.ones(2, 3))
    assert messages() > before
    end_rank_programs(client)
    second.close()
