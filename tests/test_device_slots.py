"""Tensors between workers through memory that both processes map, as GPUs share theirs.

The memory is the host's here: what is tested is all but the calls of CUDA.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import host_slots
import taskgrad as tg
from conftest import wait_until
from helpers import assert_same
from taskgrad.cluster.channels import device_slots
from taskgrad.cluster.channels.device_slots import DeviceSlots
from taskgrad.cluster.channels.frames import Stream, pack
from test_sockets import End, connect
from test_wire import DTYPES, LAYOUTS, assert_arrived, make

TAG = (1, 2, 3)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture
def host():
    """Tensors of this process go through slots."""
    host_slots.use()
    yield
    host_slots.use_none()


@pytest.fixture
def two(host):
    ends = [End(rank, 2) for rank in range(2)]
    connect(ends)
    yield ends
    for end in ends:
        end.channels.close(5)


def slots_of(end: End) -> DeviceSlots:
    [peer] = end.channels._peers.values()
    return peer.devices.slots


def placed(end: End) -> int:
    [peer] = end.channels._peers.values()
    return len(peer.placed)


def agree(ends: list[End]) -> None:
    """Send a first value, which offers a slot."""
    a, b = ends
    a.channels.send(1, (0, 0, 0), torch.ones(3))
    assert_same(b.value((0, 0, 0)), torch.ones(3))
    assert placed(a) == 0  # it went through the host
    assert wait_until(lambda: slots_of(a).is_ready)


def test_a_value_goes_into_a_slot_once_the_peer_has_read_one(two):
    agree(two)
    a, b = two
    sent = {"x": torch.arange(1000.0), "y": [None, 3, torch.zeros(0, 2), torch.ones(2, 2).T]}
    a.channels.send(1, TAG, sent)
    assert placed(a) == 1
    assert not a.channels.has_sent(1, TAG)
    found = b.value(TAG)
    assert_same(found["x"], sent["x"])
    assert found["y"][:2] == [None, 3]
    assert found["y"][2].shape == (0, 2)
    assert found["y"][3].stride() == (1, 2)
    assert wait_until(lambda: a.channels.has_sent(1, TAG))
    assert len(slots_of(a)._free) == 2


def test_slots_are_written_again(two):
    agree(two)
    a, b = two
    made = host_slots.HostSlot.made
    for i in range(20):
        a.channels.send(1, (1, i, 0), torch.full((100 + i % 3,), float(i)))
        assert_same(b.value((1, i, 0)), torch.full((100 + i % 3,), float(i)))
        assert wait_until(lambda: placed(a) == 0)
    assert host_slots.HostSlot.made - made <= 3


def test_what_is_on_its_way_stays_as_it_was(two):
    agree(two)
    a, b = two
    x = torch.zeros(50)
    for i in range(5):
        a.channels.send(1, (1, i, 0), x)
        x += 1
    for i in (3, 0, 4, 1, 2):
        assert_same(b.value((1, i, 0)), torch.full((50,), float(i)))


def test_free_slots_are_few_and_dropped_at_both_ends(two):
    agree(two)
    a, b = two
    count = 2 * device_slots._MOST_FREE
    for i in range(count):
        a.channels.send(1, (1, i, 0), torch.full((i + 1,), 1.0))
    for i in range(count):
        b.value((1, i, 0))
    assert wait_until(lambda: placed(a) == 0)
    assert len(slots_of(a)._free) == device_slots._MOST_FREE
    a.channels.send(1, TAG, torch.ones(5000))  # with it the other end learns what is dropped
    b.value(TAG)
    assert len(slots_of(b)._open) == device_slots._MOST_FREE + 1


def test_what_is_forgotten_frees_its_slot(two):
    agree(two)
    a, b = two
    a.channels.send(1, TAG, torch.ones(10))
    assert wait_until(lambda: TAG in b.came)
    b.came.clear()  # as a program that was stopped
    a.channels.forget(2)
    assert placed(a) == 0
    assert len(slots_of(a)._free) == 1
    a.channels.send(1, (2, 0, 0), torch.full((10,), 7.0))
    assert_same(b.value((2, 0, 0)), torch.full((10,), 7.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(host, layout):
    slots = DeviceSlots()
    slots.answered(True)
    other = DeviceSlots()
    for dtype in DTYPES:
        t = make(dtype, [4, 5], layout)
        found = arrived(pack(TAG, t, carrier=slots), other)
        assert_arrived(found, t)


def arrived(packed: Any, slots: DeviceSlots) -> Any:
    stream = Stream()
    data = b"".join(map(bytes, packed.buffers))
    while data:
        room = stream.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        data = data[count:]
        for value in stream.received(room, count):
            assert value.is_placed == bool(packed.placed)
            value.load = slots.load if value.is_placed else None
            return value.value()


def test_what_cannot_be_pickled_gives_its_slots_back(host):
    slots = DeviceSlots()
    slots.answered(True)
    with pytest.raises(TypeError, match="pickle"):
        pack(TAG, [torch.ones(3), (i for i in range(3))], carrier=slots)
    assert len(slots._free) == 1


def test_a_device_without_room_sends_through_the_host(host, monkeypatch):
    slots = DeviceSlots()
    slots.answered(True)

    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setitem(device_slots.KINDS, "cpu", (full, host_slots.OpenHostSlot))
    packed = pack(TAG, torch.ones(3), carrier=slots)
    assert not packed.placed
    assert_same(arrived(packed, DeviceSlots()), torch.ones(3))


class Wrong(host_slots.OpenHostSlot):
    def read(self, nbytes: int) -> torch.Tensor:
        return super().read(nbytes) * 0


@pytest.mark.parametrize("opens", [host_slots.cannot_open, Wrong])
def test_a_peer_that_cannot_read_is_not_sent_slots(two, opens, monkeypatch):
    monkeypatch.setitem(device_slots.KINDS, "cpu", (host_slots.HostSlot, opens))
    a, b = two
    for i in range(3):
        a.channels.send(1, (1, i, 0), torch.ones(3))
        assert_same(b.value((1, i, 0)), torch.ones(3))
        assert wait_until(lambda: slots_of(a)._reads is False)
        assert placed(a) == 0


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def workers(client):
    client.run(host_slots.use)
    yield client
    client.run(host_slots.use_none)


class Fails(nn.Module):
    """Raises at the call of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.number:
            raise ValueError("mine")
        return x * 1


def model(fails: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Tanh(), Fails(fails), nn.Linear(32, 3)
    )


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(count)]


def plain_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    for a, b in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
        loss = nn.functional.cross_entropy(net(a), b)
        (loss * (len(a) / len(x))).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_trained(chain: tg.GraphChain, net: nn.Module) -> None:
    """The chain has the bits of a network, on whichever device that is."""
    found = chain.to_module().state_dict()
    for name, value in net.state_dict().items():
        assert_same(found[name], value.cpu())


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h2"])
def test_training_through_slots_has_the_bits_of_torch(workers, schedule):
    net = model()
    chain = tg.GraphChain(copy.deepcopy(net), placement=[0, 0, 0, 1, 1], client=workers)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3, schedule=schedule)
    optimizer = SGD(net.parameters())
    for x, y in batches(8):
        trainer.step(x, y)
        plain_step(net, optimizer, x, y)
    assert_trained(chain, net)
    for seen in workers.run(host_slots.counts).values():
        assert seen["ready"] == 1
        assert 0 < seen["free"] <= 6
        assert 0 < seen["open"] <= 6
        assert seen["used"] == 0


@pytest.fixture
def shared(client, gpu):
    """A GPU, whose memory the workers share; another device shares it as a GPU would."""
    if gpu != "cuda":
        client.run(host_slots.use, gpu)
    yield gpu
    if gpu != "cuda":
        client.run(host_slots.use_none, gpu)


def test_training_on_a_device_sends_through_its_memory(client, shared):
    net = model().to(shared)
    chain = tg.GraphChain(model(), placement=[0, 0, 0, 1, 1], device=shared, client=client)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
    optimizer = SGD(net.parameters())
    for x, y in batches(8):
        trainer.step(x, y)
        plain_step(net, optimizer, x.to(shared), y.to(shared))
    assert_trained(chain, net)
    for seen in client.run(host_slots.counts).values():
        assert seen["ready"] == 1
        assert seen["free"] > 0
        assert seen["open"] > 0


def test_a_step_that_fails_leaves_no_slot_in_use(workers):
    net = model()
    # The fourth step's second microbatch, while the others are on their way.
    chain = tg.GraphChain(model(fails=3 * 3 + 2), placement=[0, 0, 0, 1, 1], client=workers)
    trainer = tg.Trainer(chain, nn.functional.cross_entropy, SGD, microbatches=3)
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches(8)):
        if i == 3:
            with pytest.raises(tg.LayerError, match="mine"):
                trainer.step(x, y).item()
            assert all(c["used"] == 0 for c in workers.run(host_slots.counts).values())
            trainer.step(x, y)
        else:
            trainer.step(x, y).item()
        plain_step(net, optimizer, x, y)
    assert_trained(chain, net)
    assert all(c["free"] <= 6 for c in workers.run(host_slots.counts).values())
