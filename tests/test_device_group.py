"""Tensors between workers over process groups, as GPUs of two hosts send theirs over NCCL.

The groups are gloo's and the memory the host's: what is tested is all but the calls of NCCL.
"""

from __future__ import annotations

import copy
import datetime
import threading
from typing import Any

import dask
import pytest
import torch
from torch import nn

import host_groups
import host_slots
import taskgrad as tg
from conftest import wait_until
from helpers import assert_same
from taskgrad.cluster.channels import device_group
from taskgrad.cluster.channels.device_group import DeviceGroup
from taskgrad.cluster.channels.pair_store import PairStore
from test_device_slots import SGD, assert_trained, batches, model, plain_step
from test_sockets import End, connect
from test_wire import DTYPES, LAYOUTS, assert_arrived, make

TAG = (1, 2, 3)


@pytest.fixture
def host():
    """Tensors of this process go over groups."""
    host_groups.use()
    yield
    host_groups.use_none()


def ends_of(count: int) -> list[End]:
    ends = [End(rank, count, groups=True) for rank in range(count)]
    connect(ends)
    return ends


@pytest.fixture
def two(host):
    ends = ends_of(2)
    yield ends
    for end in ends:
        end.channels.close(5)


def group_of(end: End, peer: int | None = None) -> DeviceGroup:
    peers = end.channels._peers
    [found] = peers.values() if peer is None else [peers[peer]]
    return found.devices.group


def agree(ends: list[End]) -> None:
    """Send first values, which have the groups formed."""
    for a in range(len(ends)):
        for b in range(a):
            ends[a].channels.send(b, (0, a, b), torch.ones(3))
            assert_same(ends[b].value((0, a, b)), torch.ones(3))  # through the host
    pairs = [(ends[a], b) for a in range(len(ends)) for b in range(len(ends)) if a != b]
    assert wait_until(lambda: all(group_of(end, b).is_ready for end, b in pairs))


@pytest.mark.parametrize("sender", [0, 1])
def test_a_value_goes_over_the_group(two, sender):
    agree(two)
    a, b = two[sender], two[1 - sender]
    mine, theirs = group_of(a)._pair, group_of(b)._pair
    for pair in (mine, theirs):
        pair.log.clear()
    sent = {"x": torch.arange(1000.0), "y": [None, 3, torch.zeros(0, 2), torch.ones(2, 2).T]}
    a.channels.send(1 - sender, TAG, sent)
    sent["x"] += 1  # it was copied
    found = b.value(TAG)
    assert_same(found["x"], torch.arange(1000.0))
    assert found["y"][:2] == [None, 3]
    assert found["y"][2].shape == (0, 2)
    assert found["y"][3].stride() == (1, 2)
    assert mine.log == ["send"]
    assert theirs.log == ["receive"]
    assert not group_of(a).is_busy
    assert not group_of(b).is_busy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(two, layout):
    agree(two)
    a, b = two
    for i, dtype in enumerate(DTYPES):
        t = make(dtype, [4, 5], layout)
        a.channels.send(1, (1, i, 0), t)
        assert_arrived(b.value((1, i, 0)), t)


@pytest.mark.parametrize("sender", [0, 1])
def test_the_higher_rank_posts_first(two, sender):
    """A device never waits for one of a higher rank, so that no two wait for each other."""
    agree(two)
    order: list[tuple[int, str]] = []
    for rank, end in enumerate(two):
        pair = group_of(end)._pair
        for what in ("send", "receive"):
            before = getattr(pair, what)

            def post(memory: Any, rank: int = rank, what: str = what, before: Any = before) -> Any:
                order.append((rank, what))
                return before(memory)

            setattr(pair, what, post)
    two[sender].channels.send(1 - sender, TAG, torch.ones(10))
    assert_same(two[1 - sender].value(TAG), torch.ones(10))
    assert wait_until(lambda: len(order) == 2)
    assert [rank for rank, _ in order] == [1, 0]


@pytest.mark.parametrize("attended", [True, False])
def test_all_to_all(host, attended):
    """Each of three sends many values to each other one at once, while none of them receives."""
    ends = ends_of(3)
    agree(ends)
    for end in ends:
        end.channels.attend(attended)
    values = {
        (a, b, i): torch.full((1000 + i,), float(100 * a + 10 * b + i))
        for a in range(3)
        for b in range(3)
        for i in range(20)
        if a != b
    }

    def send(rank: int) -> None:
        for (a, b, i), value in values.items():
            if a == rank:
                ends[a].channels.send(b, (1, a, i), [value, value[:10]])

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for (a, b, i), value in values.items():
        found = ends[b].value((1, a, i))
        assert_same(found[0], value)
        assert_same(found[1], value[:10])
    for thread in threads:
        thread.join(10)
    for end in ends:
        assert sum(p.devices.group._pair.sends for p in end.channels._peers.values()) == 42
    for end in ends:
        end.channels.close(5)


def test_a_stop_leaves_what_was_announced_in_order(two):
    """A program that is stopped drops what has come; the next values are none of those."""
    agree(two)
    a, b = two
    for i in range(3):
        a.channels.send(1, (1, i, 0), torch.full((10,), -1.0))
    assert wait_until(lambda: len(b.came) == 3)
    b.came.clear()
    a.channels.forget(2)
    b.channels.forget(2)
    a.channels.send(1, (2, 0, 0), torch.full((10,), 7.0))
    assert_same(b.value((2, 0, 0)), torch.full((10,), 7.0))


def test_a_receiver_without_room_says_so(two, monkeypatch):
    agree(two)
    a, b = two
    pair = group_of(b)._pair

    def full(nbytes: int) -> Any:
        raise RuntimeError(f"CUDA out of memory: {nbytes}")

    with monkeypatch.context() as patch:
        patch.setattr(pair, "room", full)
        a.channels.send(1, TAG, torch.ones(10))
        with pytest.raises(RuntimeError, match="out of memory: 256"):
            b.value(TAG)
    assert wait_until(lambda: not group_of(a).is_busy)
    a.channels.send(1, (1, 3, 0), torch.ones(10))
    assert_same(b.value((1, 3, 0)), torch.ones(10))


def test_a_sender_without_room_sends_through_the_host(two, monkeypatch):
    agree(two)
    a, b = two

    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(group_of(a)._pair, "gather", full)
    a.channels.send(1, TAG, torch.ones(10))
    assert_same(b.value(TAG), torch.ones(10))
    assert not group_of(a).is_busy


def test_two_ranks_on_one_device_form_no_group(host):
    host_groups.use(made=host_groups.Host("cpu", same=True))
    ends = ends_of(2)
    for i in range(5):
        ends[0].channels.send(1, (0, i, 0), torch.ones(3))
        assert_same(ends[1].value((0, i, 0)), torch.ones(3))
    assert wait_until(lambda: all(group_of(end)._store is not None for end in ends))
    for end in ends:
        assert group_of(end)._pair is None
        assert not group_of(end).is_ready
        end.channels.close(5)


def test_values_of_the_host_form_no_group(two, monkeypatch):
    monkeypatch.setattr(device_group, "grouped_kind", lambda: "xpu")
    for i in range(3):
        two[0].channels.send(1, (0, i, 0), [torch.ones(3), "x"])
        assert_same(two[1].value((0, i, 0))[0], torch.ones(3))
    assert group_of(two[0])._attempts == 0


def test_without_groups_at_one_end_values_go_through_the_host(host):
    ends = [End(0, 2, groups=True), End(1, 2)]
    connect(ends)
    for i in range(5):
        ends[0].channels.send(1, (0, i, 0), torch.ones(3))
        assert_same(ends[1].value((0, i, 0)), torch.ones(3))
    assert group_of(ends[0])._attempts <= device_group._ATTEMPTS
    assert not group_of(ends[0]).is_ready
    for end in ends:
        end.channels.close(5)


class Wrong(host_groups.HostPair):
    def send(self, memory: torch.Tensor) -> None:
        super().send(memory * 0)


def test_a_group_that_sends_other_bytes_is_not_used(host):
    wrong = host_groups.Host("cpu")
    wrong.form = lambda store, place: Wrong(store, place, "cpu")  # type: ignore[method-assign]
    host_groups.use(made=wrong)
    ends = ends_of(2)
    ends[0].channels.send(1, (0, 0, 0), torch.ones(3))
    assert wait_until(lambda: all(group_of(end)._closed for end in ends))
    ends[0].channels.send(1, (0, 1, 0), torch.ones(3))
    assert_same(ends[1].value((0, 1, 0)), torch.ones(3))
    for end in ends:
        assert group_of(end)._pair is None
        end.channels.close(5)


def test_an_end_that_cannot_form_a_group_keeps_nobody_waiting(host):
    """The other end is in the middle of forming it: it waits for the store."""
    forms = host_groups.Host("cpu")
    formed = forms.form

    def form(store: Any, place: int) -> Any:
        if place == 1:
            raise RuntimeError("NCCL cannot be used here")
        return formed(store, place)

    forms.form = form  # type: ignore[method-assign]
    host_groups.use(made=forms)
    ends = ends_of(2)
    ends[0].channels.send(1, (0, 0, 0), torch.ones(3))
    assert wait_until(lambda: all(group_of(end)._closed for end in ends), 5)
    assert wait_until(
        lambda: not any(t.name == "taskgrad-device-group" for t in threading.enumerate()), 5
    )
    ends[0].channels.send(1, (0, 1, 0), torch.ones(3))
    assert_same(ends[1].value((0, 1, 0)), torch.ones(3))
    for end in ends:
        end.channels.close(5)


def test_a_peer_that_is_gone_ends_the_group(two):
    agree(two)
    a, b = two
    b.channels.close(5)
    assert wait_until(lambda: a.lost == [1])
    assert group_of(a)._pair is None
    assert not any(t.name == "taskgrad-device-group" for t in threading.enumerate())


def test_a_store_waits_for_the_other_end_until_that_is_gone():
    told: list[tuple[str, bytes]] = []
    store = PairStore(lambda key, value: told.append((key, value)))
    wrapped = torch.distributed.PrefixStore("p", store)
    wrapped.set("mine", b"1")
    assert told == [("p/mine", b"1")]
    assert wrapped.get("mine") == b"1"
    threading.Timer(0.1, store.put, ("p/theirs", b"2")).start()
    assert wrapped.get("theirs") == b"2"
    with pytest.raises(TimeoutError, match="has not set"):
        store.wait(["other"], datetime.timedelta(seconds=0.05))
    threading.Timer(0.1, store.close).start()
    with pytest.raises(Exception, match="the other worker is gone"):
        wrapped.get("other")


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def workers(client):
    client.run(host_groups.use)
    yield client
    client.run(host_groups.use_none)


def all_ready(client: Any, count: int = 1) -> bool:
    """Each worker has so many groups; those of an earlier test go with its trainer, a bit later."""
    return all(seen["ready"] == count for seen in client.run(host_groups.counts).values())


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h2"])
def test_training_over_groups_has_the_bits_of_torch(workers, schedule):
    net = model()
    chain = tg.GraphChain(copy.deepcopy(net), placement=[0, 0, 0, 1, 1], client=workers)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3, schedule=schedule)
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches(12)):
        trainer.step(x, y)
        plain_step(net, optimizer, x, y)
        if i == 2:
            trainer.wait()
            assert wait_until(lambda: all_ready(workers))
    assert_trained(chain, net)
    for seen in workers.run(host_groups.counts).values():
        assert seen["busy"] == 0
        assert seen["announced"] >= 9 * 3


@pytest.fixture
def apart(client, gpu):
    """A device for each worker, of one kind: GPUs send over NCCL, others over gloo in its place."""
    if torch.get_device_module(gpu).device_count() < 2:
        pytest.skip("NCCL needs two GPUs")
    if gpu != "cuda":
        client.run(host_groups.use, gpu)
    client.run(host_slots.without)  # as on two hosts
    yield {0: f"{gpu}:0", 1: f"{gpu}:1"}
    client.run(host_slots.as_before)
    if gpu != "cuda":
        client.run(host_groups.use_none, gpu)


def test_training_on_two_devices_goes_over_the_group(client, gpu, apart):
    net = model().to(gpu)
    placement = [0, 0, 0, 1, 1]
    chain = tg.GraphChain(model(), placement=placement, device=apart, client=client)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches(12)):
        trainer.step(x, y)
        plain_step(net, optimizer, x.to(gpu), y.to(gpu))
        if i == 2:
            trainer.wait()
            assert wait_until(lambda: all_ready(client), 60)
    assert_trained(chain, net)
    for seen in client.run(host_groups.counts).values():
        assert seen["announced"] >= 9 * 3


def test_steps_that_fail_are_taken_again(workers):
    net = model()
    chain = tg.GraphChain(model(fails=3 * 6 + 2), placement=[0, 0, 0, 1, 1], client=workers)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches(12)):
        if i == 6:
            assert wait_until(lambda: all_ready(workers))
            with pytest.raises(tg.LayerError, match="mine"):
                trainer.step(x, y).item()
            trainer.step(x, y)
        else:
            trainer.step(x, y).item()
        plain_step(net, optimizer, x, y)
    assert_trained(chain, net)
    for seen in workers.run(host_groups.counts).values():
        assert seen["busy"] == 0
        assert seen["announced"] >= 6 * 3


def fill_once() -> None:
    """Have this process's next value on a device find no memory."""
    room = host_groups.HostPair.room

    def full(self: Any, nbytes: int) -> Any:
        host_groups.HostPair.room = room  # type: ignore[method-assign]
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")

    host_groups.HostPair.room = full  # type: ignore[method-assign]


def test_a_full_device_is_one_error_and_the_step_is_taken_again(workers):
    net = model()
    chain = tg.GraphChain(model(), placement=[0, 0, 0, 1, 1], client=workers)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches(8)):
        if i == 3:
            assert wait_until(lambda: all_ready(workers))
            workers.run(fill_once, workers=[list(workers.run(int))[1]])
            with pytest.raises(tg.LayerError, match="out of memory") as caught:
                trainer.step(x, y).item()
            print(caught.value)
        trainer.step(x, y).item()
        plain_step(net, optimizer, x, y)
    assert_trained(chain, net)


def test_a_setting_switches_groups_off(workers):
    with dask.config.set({"taskgrad.nccl.enabled": False}):
        chain = tg.GraphChain(model(), placement=[0, 0, 0, 1, 1], client=workers)
        trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
        for x, y in batches(3):
            trainer.step(x, y).item()
        assert wait_until(lambda: all_ready(workers, 0))
