"""Buffers that are read where they lie in another process, and messages that lend them."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.protocol import serialize_bytes, to_serialize
from distributed.protocol.core import dumps, loads

from leasing import HERE, leasing, needs_call, needs_others
from taskgrad.cluster.wire import message_leases, process_memory, thresholds
from taskgrad.cluster.wire import serialize as _family  # noqa: F401  registers it
from taskgrad.cluster.wire.message_leases import MessageLease
from taskgrad.cluster.wire.peers import PeerRegistry

MIB = 2**20
COUNT = 8_000_000  # floats: 32 MB


# Reading.


@needs_call
@pytest.mark.parametrize("sizes", [[5], [3, 9], [2 * MIB], [3 * MIB + 1, 7, 40 * MIB + 3]])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read(monkeypatch, sizes, threads):
    monkeypatch.setattr(process_memory, "_THREADS", threads)
    sources = [np.random.randint(0, 256, n, np.uint8) for n in sizes]
    views = [memoryview(bytearray(n)) for n in sizes]
    there = [process_memory.address_of(s.data) for s in sources]
    process_memory.read(os.getpid(), list(zip(there, views, strict=True)))
    for source, view in zip(sources, views, strict=True):
        assert bytes(view) == source.tobytes()


@pytest.mark.parametrize("size", [1, 63, 4 * MIB, 5 * MIB + 3])
def test_room_is_aligned_and_in_huge_pages_where_that_pays(size):
    rooms = [process_memory.allocate(size) for _ in range(3)]
    for room in rooms:
        assert room.nbytes == size
        assert not room.readonly
        assert process_memory.address_of(room) % 64 == 0
        if size >= 4 * MIB and Path("/sys/kernel/mm/transparent_hugepage").exists():
            assert "hg" in flags_at(process_memory.address_of(room) + size // 2)


def flags_at(address: int) -> list[str]:
    """What the kernel was told about the memory at this address; "hg": to use huge pages."""
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name, *rest = line.split()
            if "-" in name and not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                inside = first <= address < last
            elif inside and name == "VmFlags:":
                return rest
    raise LookupError(hex(address))


@needs_call
def test_more_pieces_than_one_call_takes():
    source = np.random.randint(0, 256, 3000, np.uint8)
    views = [memoryview(bytearray(1)) for _ in source]
    first = process_memory.address_of(source.data)
    process_memory.read(os.getpid(), [(first + i, view) for i, view in enumerate(views)])
    assert b"".join(views) == source.tobytes()


@needs_call
@pytest.mark.parametrize("stop", [1, 10, MIB - 1])
def test_a_read_that_stops_early_goes_on(monkeypatch, stop):
    """As the kernel may: it says how many bytes it did."""
    call = process_memory._call

    def short(library):
        def some(pid, here, count, there, _, flags):
            here[0].length = there[0].length = min(stop, here[0].length)
            return call(library)(pid, here, 1, there, 1, flags)

        return some

    source = np.random.randint(0, 256, 2000, np.uint8)
    views = [memoryview(bytearray(n)) for n in (13, 1987)]
    first = process_memory.address_of(source.data)
    monkeypatch.setattr(process_memory, "_call", short)
    process_memory.read(os.getpid(), [(first, views[0]), (first + 13, views[1])])
    assert b"".join(views) == source.tobytes()


@needs_call
@pytest.mark.parametrize("size", [16, 8 * MIB])
def test_memory_that_is_not_there_is_an_os_error(size):
    with pytest.raises(OSError, match="cannot read the memory"):
        process_memory.read(os.getpid(), [(4096, memoryview(bytearray(size)))])
    with pytest.raises(OSError, match="cannot read the memory"):
        process_memory.read(2**22 + 1, [(4096, memoryview(bytearray(size)))])


def test_where_the_system_has_no_such_call(monkeypatch):
    monkeypatch.setattr(process_memory, "_call", lambda library: None)
    assert not process_memory.available()
    with pytest.raises(OSError, match="not implemented"):
        process_memory.read(os.getpid(), [(4096, memoryview(bytearray(1)))])
    assert not message_leases.apply(Nobody())


class Nobody:
    """All that matters here of a worker."""

    address = HERE


# Messages: what this process writes and reads again.


def written(value: Any) -> list[Any]:
    """The frames of a message to somebody, as they arrive there."""
    frames = dumps({"data": to_serialize(value)}, context={"recipient": {}})
    return [bytes(f) if i == 0 else bytearray(f) for i, f in enumerate(frames)]


def nbytes(frames: list[Any]) -> int:
    return sum(len(f) for f in frames)


@needs_call
def test_lent_buffers_are_not_in_the_message():
    value = {"a": torch.randn(COUNT), "b": [torch.randn(300, 700).T, torch.ones(3)], "n": 1}
    before = message_leases.bytes_read()
    with leasing():
        frames = written(value)
        back = loads(frames)["data"]
    assert nbytes(frames) < 2000
    assert torch.equal(back["a"], value["a"])
    assert torch.equal(back["b"][0], value["b"][0])
    assert back["b"][0].stride() == value["b"][0].stride()
    assert torch.equal(back["b"][1], value["b"][1])
    assert message_leases.bytes_read() - before == 4 * (COUNT + 300 * 700)
    back["a"].add_(1)


@needs_call
def test_read_only_buffers_arrive_read_only():
    array = np.ones(MIB)
    array.flags.writeable = False
    with leasing():
        array_back, t = loads(written((array, torch.ones(MIB))))["data"]
    assert not array_back.flags.writeable
    assert np.array_equal(array_back, array)


@needs_call
def test_what_was_made_for_the_message_is_kept_until_the_receiver_has_it():
    t = torch.randn(COUNT, 2)[:, 0]  # is packed into memory of its own
    want = t.clone()
    with leasing():
        frames = written(t)
        gc.collect()
        others = [torch.zeros(COUNT) for _ in range(3)]  # take any memory that is free
        assert torch.equal(loads(frames)["data"], want)
        assert others


@needs_call
@pytest.mark.parametrize("answered", [True, False])
def test_a_lease_that_has_ended_is_refused(answered):
    t = torch.randn(MIB)
    with leasing() as lease:
        frames = written(t)
        assert torch.equal(loads(frames)["data"], t)
        lease.finish(answered)
        with pytest.raises(OSError, match="ended"):
            loads(frames)
        assert nbytes(written(t)) > t.nbytes  # nor is more lent
    assert lease._buffers == []


@needs_call
def test_a_lease_that_ends_while_it_is_read_is_refused(monkeypatch):
    read = process_memory.read

    def and_end(pid, pieces):
        read(pid, pieces)
        lease.finish(False)

    with leasing() as lease:
        frames = written(torch.randn(MIB))
        monkeypatch.setattr(process_memory, "read", and_end)
        with pytest.raises(OSError, match="ended"):
            loads(frames)


@needs_call
def test_small_buffers_and_those_beyond_the_limit_are_sent(monkeypatch):
    monkeypatch.setattr(thresholds, "LEASE_MESSAGE_MAX", 6 * MIB)
    value = [torch.randn(n) for n in (MIB, MIB // 2 + 1, MIB // 2, 100)]  # 4, 2 and a bit, 2 MiB
    with leasing():
        frames = written((1, value))
        for back, t in zip(loads(frames)["data"][1], value, strict=True):
            assert torch.equal(back, t)
    assert 2 * MIB < nbytes(frames) < 2.1 * MIB


def test_what_goes_to_disk_meanwhile_is_whole():
    t = torch.randn(MIB)
    with leasing():
        assert len(serialize_bytes((1, t))) > t.nbytes


def test_who_is_not_on_this_host_is_not_probed():
    registry = PeerRegistry("tls://10.0.0.1:1234")
    assert not registry.is_due(None)
    assert not registry.is_due("tls://10.0.0.2:1234")
    assert registry.is_due("tls://10.0.0.1:99")


def test_probes_are_few_until_a_lease_succeeds():
    registry, there = PeerRegistry(HERE), f"{HERE}0"  # on the same host

    def lend(answered):
        registry.readers.add(there)
        lease = MessageLease(registry.readers, there)
        lease.pack(b"", [memoryview(bytearray(thresholds.LEASE_MESSAGE_MIN))])
        lease.finish(answered)
        return there in registry.readers

    assert [registry.is_due(there) for _ in range(5)] == [True] * 3 + [False] * 2
    assert not lend(answered=False)
    assert not registry.is_due(there)
    assert lend(answered=True)
    assert not registry.is_due(there)
    registry.readers.discard(there)
    assert registry.is_due(there)


@needs_others
def test_a_process_that_has_not_imported_it_reads_what_was_lent(tmp_path):
    t = torch.arange(MIB, dtype=torch.int32)
    body = f"""
        import pickle, sys, torch
        from distributed.protocol.core import loads
        t = loads(pickle.load(open({str(tmp_path / "message")!r}, "rb")))["data"][1]
        assert torch.equal(t, torch.arange({MIB}, dtype=torch.int32))
        assert "taskgrad.cluster.wire.serialize" not in sys.modules
        """
    with leasing():
        frames = written((1, t))
        assert nbytes(frames) < 2000
        (tmp_path / "message").write_bytes(pickle.dumps(frames))
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(body)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
