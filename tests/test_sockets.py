"""Channels over sockets: both ends in this process, as nothing else of a worker takes part."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest
import torch

from conftest import wait_until
from taskgrad.cluster.channels.frames import Tag
from taskgrad.cluster.channels.sockets import DRIVER, SocketChannels

HOST = "127.0.0.1"


class End:
    """A worker's end, and what came to it."""

    def __init__(
        self,
        rank: int,
        size: int,
        lends: bool = True,
        groups: bool = False,
        listens: bool = True,
    ) -> None:
        self.came: dict[Tag, Any] = {}
        self.lost: list[int] = []
        self.channels = SocketChannels(
            "a secret", rank, size, lends, groups, self.came.__setitem__, self.lost.append
        )
        self.port = self.channels.listen(HOST) if listens else 0

    def value(self, tag: Tag) -> Any:
        """Wait for a value, as a program does."""
        until = time.monotonic() + 20
        while tag not in self.came:
            assert time.monotonic() < until
            self.channels.wait(1)
        return self.channels.unpack(self.came.pop(tag))


def connect(ends: list[End], driver: bool = False) -> None:
    where = [(HOST, end.port) for end in ends] + [("", 0)] * driver
    threads = [threading.Thread(target=e.channels.connect, args=(where, 10)) for e in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


@pytest.fixture
def three():
    ends = [End(rank, 3) for rank in range(3)]
    connect(ends)
    yield ends
    for end in ends:
        end.channels.close(5)
        assert not end.channels._thread.is_alive()


def test_values_come_from_everybody(three):
    for rank, end in enumerate(three):
        for peer in set(range(3)) - {rank}:
            end.channels.send(peer, (0, rank, peer), torch.full((3,), float(rank)))
    for rank, end in enumerate(three):
        for peer in set(range(3)) - {rank}:
            assert end.value((0, peer, rank)).tolist() == [peer] * 3


@pytest.mark.parametrize("attended", [True, False])
@pytest.mark.parametrize("lend", [True, False])
def test_large_values_pass_while_both_programs_compute(lend, attended):
    """More than the system keeps for a connection, and both ends send before they receive."""
    ends = [End(0, 2), End(1, 2, lends=lend)]
    connect(ends)
    values = [torch.randn(8_000_000) for _ in ends]
    for rank, end in enumerate(ends):
        end.channels.attend(attended)
        peer = end.channels._peers[1 - rank]
        assert peer.reads is lend
        for i in range(2):
            end.channels.send(1 - rank, (0, i, 0), values[rank])
        assert len(peer.lent) == (2 if lend else 0)
    # Nobody waits for them.
    assert wait_until(lambda: all(len(end.came) == 2 for end in ends))
    for rank, end in enumerate(ends):
        for i in range(2):
            assert torch.equal(end.value((0, i, 0)), values[1 - rank])
    assert wait_until(lambda: not any(p.lent for e in ends for p in e.channels._peers.values()))
    for end in ends:
        end.channels.close(5)


@pytest.fixture
def driven():
    """Two workers' ends, and a driver's."""
    ends = [End(rank, 2) for rank in range(2)]
    driver = End(2, 3, lends=False, listens=False)
    driver.channels.reach([(HOST, end.port) for end in ends], 10)
    thread = threading.Thread(target=driver.channels.join, args=(10,))
    thread.start()
    connect(ends, driver=True)
    thread.join(20)
    yield driver, ends
    for end in (driver, *ends):
        end.channels.close(5)
        assert not end.channels._thread.is_alive()


def test_a_driver_takes_part(driven):
    driver, ends = driven
    driver.channels.post([{"op": "step", "number": rank} for rank in range(2)])
    for rank, end in enumerate(ends):
        assert end.value(DRIVER) == {"op": "step", "number": rank}
        end.channels.send(2, DRIVER, {"op": "done", "by": rank})
        assert wait_until(lambda: DRIVER in driver.came)
        assert driver.channels.unpack(driver.came.pop(DRIVER)) == {"op": "done", "by": rank}
    ends[0].channels.send(1, (0, 0, 0), torch.ones(3))
    assert ends[1].value((0, 0, 0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("attended", [True, False])
def test_what_a_driver_posts_is_sent_whatever_the_program_does(driven, attended):
    """More than the system keeps for a connection, to a program that computes, or that rests."""
    driver, ends = driven
    ends[0].channels.attend(attended)
    given = torch.randn(8_000_000)
    driver.channels.post([{"x": given}, None])
    assert wait_until(driver.channels.has_posted)
    kept = given.clone()
    given.zero_()
    assert wait_until(lambda: DRIVER in ends[0].came)
    assert torch.equal(ends[0].value(DRIVER)["x"], kept)


def test_a_driver_and_its_programs_find_each_other_lost(driven):
    driver, ends = driven
    ends[1].channels.close(5)
    assert wait_until(lambda: driver.lost == [1])
    driver.channels.post(["arrives", "goes nowhere, and raises nothing"])
    assert wait_until(driver.channels.has_posted)
    driver.channels.close(5)
    assert wait_until(lambda: sorted(ends[0].lost) == [1, 2])


def test_a_driver_that_reaches_no_worker():
    driver = End(1, 2, listens=False)
    with pytest.raises(OSError, match="refused"):
        driver.channels.reach([(HOST, free_port())], 10)
    driver.channels.close(5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def test_what_nobody_reads_is_not_kept(three):
    first, second, _ = three
    for epoch in (0, 1):
        first.channels.send(1, (epoch, 0, 0), torch.full((1 << 20,), float(epoch)))
    first.channels.forget(1)
    assert list(first.channels._peers[1].lent) == [(1, 0, 0)]
    assert second.value((1, 0, 0))[5] == 1
    with pytest.raises(ConnectionError, match="dropped a value"):
        second.value((0, 0, 0))  # its memory may hold something else by now


def test_a_wait_ends_when_it_is_told_to(three):
    channels = three[0].channels
    threading.Timer(0.2, channels.wake).start()
    start = time.monotonic()
    channels.wait(20)
    assert time.monotonic() - start < 10
    channels.wake()  # before the wait that looks again
    channels.wait(20)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("attended", [True, False])
def test_a_lost_peer_is_found(three, attended):
    for end in three:
        end.channels.attend(attended)
    three[0].channels.close(5)
    assert wait_until(lambda: [end.lost for end in three] == [[], [0], [0]])
    three[1].channels.send(0, (0, 0, 0), torch.ones(1))  # goes nowhere, and raises nothing
    three[1].channels.send(2, (0, 0, 0), torch.ones(1))
    assert three[2].value((0, 0, 0)).tolist() == [1]


def test_strangers_are_refused():
    ends = [End(0, 2), End(1, 2)]
    stranger = socket.create_connection((HOST, ends[0].port))
    stranger.sendall(b"no secret" + bytes(100))
    early = socket.create_connection((HOST, ends[0].port))
    early.close()
    silent = socket.create_connection((HOST, ends[0].port))
    connect(ends)
    ends[1].channels.send(0, (0, 0, 0), "from a friend")
    assert ends[0].value((0, 0, 0)) == "from a friend"
    stranger.settimeout(10)
    with contextlib.suppress(ConnectionResetError):  # it had not read all
        assert stranger.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, ends[0].port))
    silent.close()
    for end in ends:
        end.channels.close(5)


def test_nobody_waits_for_ever_for_a_peer_that_does_not_come():
    end = End(0, 2)
    with pytest.raises(TimeoutError):
        end.channels.connect([(HOST, end.port), (HOST, 1)], 0.3)
    end.channels.close(5)
