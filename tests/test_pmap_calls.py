"""Calls of a pmap that leave no tape: what is sent, beside what, and to which workers."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn

import taskgrad as tg
from conftest import keys_of, wait_until
from helpers import end_rank_programs
from taskgrad.cluster import program_hosts
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.executors import program_comms
from test_compiled_fallback import cut_off, join_again, unreachable
from test_pmap_failures import empty

X = torch.randn(4, 3)


@pytest.fixture
def sent(monkeypatch):
    """The messages to programs: (op, bytes of inputs)."""
    found: list[tuple[str, int]] = []
    post = SocketChannels.post

    def counting(self, messages):
        for message in messages:
            given = message.get("inputs")
            found.append((message["op"], sum(map(len, given._frames)) if given is not None else 0))
        post(self, messages)

    monkeypatch.setattr(SocketChannels, "post", counting)
    return found


def bytes_of(call, sent) -> int:
    """The bytes that one call sends."""
    sent.clear()
    call()
    return sum(size for _, size in sent)


def programs(dask_worker) -> list:
    """What this worker has of programs, of trainers too."""
    found = program_hosts._hosts.get(dask_worker)
    return [] if found is None else list(found.named.values())


def kept(dask_worker) -> int:
    """How many inputs this worker's programs keep."""
    return sum(len(host._kept) for host in programs(dask_worker))


def hosts(dask_worker) -> int:
    return len(programs(dask_worker))


def forget_groups(client) -> None:
    """End the groups that earlier tests left."""
    end_rank_programs(client)
    assert wait_until(lambda: not any(client.run(hosts).values()))


def test_what_is_closed_over_is_sent_once_and_again_when_it_has_changed(client, sent):
    forget_groups(client)
    while_it_exists(client, sent)
    assert wait_until(lambda: not any(client.run(kept).values()))


def test_what_all_ranks_take_is_sent_to_a_worker_once(client, sent):
    """There are several ranks on each."""
    x = torch.randn(5, 3)
    w, whole = torch.randn(20_000), torch.randn(20_000)
    f = tg.pmap(lambda x, y: x + (w + y).sum(), in_axes=(0, None), client=client)
    expected = x + (w + whole).sum()

    def call():
        assert torch.equal(f(x, whole), expected)

    first = bytes_of(call, sent)
    assert 4 * w.nbytes <= first < 5 * w.nbytes  # both tensors, to each of two workers
    assert bytes_of(call, sent) < 10_000


def while_it_exists(client, sent) -> None:
    w = torch.randn(3, 20_000)
    f = tg.pmap(lambda x: x @ w, client=client)
    x = X[:2]

    def call():
        assert torch.equal(f(x), torch.stack([row @ w for row in x]))

    assert bytes_of(call, sent) > 2 * w.nbytes
    assert [op for op, _ in sent].count("load") == 2
    assert bytes_of(call, sent) < 20_000
    assert {op for op, _ in sent} == {"step"}

    def written():
        with torch.no_grad():
            w.mul_(2)

    def unseen():
        w.data.add_(1)

    def by_numpy():
        w.numpy()[0, 0] = 7

    for write in (written, unseen, by_numpy):
        write()
        assert bytes_of(call, sent) > 2 * w.nbytes
        assert bytes_of(call, sent) < 20_000
        assert wait_until(lambda: set(client.run(kept).values()) == {1})


def test_parameters_that_an_optimizer_updates(client):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    f = tg.pmap(model, client=client)
    x = X.reshape(2, 2, 3)
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(f(x), torch.stack([model(rows) for rows in x]))
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_calls_beside_tasks_and_each_other(client):
    """Of as many threads, with tasks in between, and one within which another is made."""
    wrong = []

    def many(factor):
        for i in range(8):
            x = factor * X[:2] + i
            with torch.no_grad():
                y = tg.pmap(lambda x: tg.psum(x, "i"), "i", client=client)(x)
            if not torch.equal(y, (x[0] + x[1]).expand(2, 3)):
                wrong.append((factor, i))
            if i % 3 == 2 and tg.collect(tg.spawn(torch.neg, x)).sum() != -x.sum():
                wrong.append(i)

    threads = [threading.Thread(target=many, args=(factor,)) for factor in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert wait_until(lambda: empty(client))


def test_no_task_a_call(client):
    f = tg.pmap(lambda x: tg.psum(x, "i"), "i", client=client)
    before = keys_of(client, "forward"), keys_of(client, "pmap")
    for i in range(20):
        x = X[:2] + i
        assert torch.equal(f(x)[0], x[0] + x[1])
    assert keys_of(client, "forward") == before[0]
    assert len(keys_of(client, "pmap") - before[1]) < 20


def test_the_next_call_after_one_that_failed(client):
    def f(x, fails):
        if fails and tg.axis_index("i") == 1:
            raise KeyError("boo")
        return tg.psum(x, "i")

    call = tg.pmap(f, "i", in_axes=(0, None), client=client)
    for _ in range(3):
        with pytest.raises(tg.LayerError, match="rank 1 of f"):
            call(X[:2], True)
        assert torch.equal(call(X[:2], False)[1], X[0] + X[1])
    assert wait_until(lambda: empty(client))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ctrl_c_ends_the_ranks(client, tmp_path, ranks):
    begun = str(tmp_path / "begun")

    def f(x):
        if tg.axis_index("i") == 0:
            open(begun, "w").close()
        if tg.axis_index("i") < ranks - 1:
            return tg.psum(x, "i")
        while os.path.exists(begun) or not os.path.exists(begun + "-not"):
            time.sleep(0.01)
        return x

    ended = threading.Event()

    def interrupt():
        assert wait_until(lambda: os.path.exists(begun))
        _thread.interrupt_main()
        while not ended.wait(5):  # Python drops it within a callback of a weak reference
            _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        tg.pmap(f, "i", client=client)(X[:ranks])
    ended.set()
    thread.join()
    open(begun + "-not", "w").close()
    os.remove(begun)
    assert wait_until(lambda: empty(client))
    assert torch.equal(
        tg.pmap(lambda x: tg.psum(x, "i"), "i", client=client)(X[:2])[0], X[0] + X[1]
    )


def test_workers_that_join_and_are_restarted(fresh):
    client = fresh(n_workers=2)
    w = torch.randn(3)
    f = tg.pmap(lambda x: (tg.psum(x * w, "i"), os.getpid()), "i", client=client)

    def check(count):
        y, processes = f(X[:count])
        assert torch.equal(y[0], sum((x * w for x in X[1:count]), start=X[0] * w))
        return processes.tolist()

    first = check(2)
    client.cluster.scale(3)
    client.wait_for_workers(3)
    assert check(3)[:2] == first
    before = set(client.nthreads())
    os.kill(first[1], signal.SIGKILL)
    assert wait_until(lambda: set(client.nthreads()) != before and len(client.nthreads()) == 3)
    again = check(3)
    assert again[0] == first[0]
    assert first[1] not in again


def test_a_worker_that_is_lost_is_named(fresh):
    client = fresh(n_workers=2)

    def f(x, ends):
        if ends and tg.axis_index("i") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if ends else 0)  # in no collective, which would notice
        return x

    call = tg.pmap(f, "i", in_axes=(0, None), client=client)
    call(X[:2], False)
    start = time.monotonic()
    with pytest.raises(tg.WorkerLostError, match=r"rank 1 of f is gone with worker 1 \(tcp://"):
        call(X[:2], True)
    assert time.monotonic() - start < 30


def test_nothing_is_left_of_a_client_that_closes(client):
    forget_groups(client)
    second = Client(client.scheduler.address, set_as_default=False)
    w = torch.randn(3)
    f = tg.pmap(lambda x: tg.psum(x * w, "i"), "i", client=second)
    f(X[:2])
    assert set(client.run(kept).values()) == {1}
    second.close()
    assert wait_until(lambda: not any(client.run(hosts).values()))
    with pytest.raises(tg.TaskgradError, match="closed"):
        f(X[:2])


def test_workers_that_cannot_be_reached_run_tasks(client, monkeypatch):
    forget_groups(client)
    monkeypatch.setattr(program_comms, "connect", unreachable)
    before = keys_of(client, "forward:rank_")
    f = tg.pmap(lambda x: tg.psum(x, "i"), "i", client=client)
    for _ in range(2):
        assert torch.equal(f(X[:2])[0], X[0] + X[1])
    assert wait_until(lambda: len(keys_of(client, "forward:rank_") - before) == 4)
    end_rank_programs(client)


@pytest.mark.parametrize("count", [10, 100_000, 1_000_000])
@pytest.mark.parametrize("kinds", [(), (SocketChannels,)], ids=["sockets", "dask"])
def test_values_go_over_channels_and_are_not_torn(client, count, kinds):
    """Each rank writes to what it has sent as soon as it has the sum."""
    forget_groups(client)
    client.run(partial(cut_off, *kinds))

    def f(x):
        found = []
        x = x.clone()
        for _ in range(5):
            found.append(tg.psum(x, "i").double().sum())
            x.add_(1)
        return torch.stack(found)

    x = torch.randn(2, count)
    try:
        found = tg.pmap(f, "i", client=client)(x)
        assert set(client.run(channels).values()) == {"DaskChannels" if kinds else "SocketChannels"}
    finally:
        client.run(join_again)
        end_rank_programs(client)
    expected = []
    for _ in range(5):
        expected.append((x[0] + x[1]).double().sum())
        x += 1
    assert torch.equal(found, torch.stack(expected).expand(2, 5))


def channels(dask_worker) -> str:
    [host] = programs(dask_worker)
    return type(host.channels).__name__


def test_buffers_are_those_of_rank_0(client):
    norm, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = X.reshape(2, 2, 3)
    f = tg.pmap(norm, client=client)
    for _ in range(2):
        with torch.no_grad():
            y = f(x)
            theirs = plain(x[0])
        assert torch.equal(y[0], theirs)
        torch.testing.assert_close(norm.running_mean, plain.running_mean, rtol=0, atol=0)
        assert norm.num_batches_tracked == plain.num_batches_tracked


@pytest.mark.long
@pytest.mark.parametrize("options", [{"processes": False}, {"security": True}], ids=["one", "tls"])
def test_workers_in_one_process_and_workers_behind_tls(options):
    w = torch.randn(300_000)
    x = torch.randn(2, 300_000)
    with (
        LocalCluster(n_workers=2, dashboard_address=":0", **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        before = x.clone()
        f = tg.pmap(lambda x: tg.psum(x.mul_(w), "i"), "i", client=client)
        for _ in range(3):
            assert torch.equal(f(x)[0], x[0] * w + x[1] * w)
            assert torch.equal(x, before)
            w.add_(1)
        assert any(client.run(hosts).values())
