"""Messages whose large buffers are leased; where this system cannot do that, tests are skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import Client

from conftest import wait_until
from taskgrad.cluster.session import session
from taskgrad.cluster.wire import message_leases, peers, process_memory
from taskgrad.cluster.wire.message_leases import MessageLease
from taskgrad.cluster.wire.peers import PeerSet

HERE, THERE = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


@contextmanager
def leasing() -> Iterator[MessageLease]:
    """A lease for the messages of this block."""
    lease = MessageLease(PeerSet(), THERE)
    with lease.attached():
        yield lease


def _can_read_others() -> bool:
    """Whether processes here can read each other: a child its parent no easier than a sibling."""
    with leasing() as lease:
        script = (
            "from taskgrad.cluster.wire.leases import ValidityToken; "
            f"assert ValidityToken{tuple(lease.token)}.is_valid()"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    return done.returncode == 0


needs_call = pytest.mark.skipif(not process_memory.available(), reason="no process_vm_readv")
needs_others = pytest.mark.skipif(not _can_read_others(), reason="no reading of other processes")

COUNT = 8_000_000  # floats: 32 MB


def make(seed: int, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def make_strided(seed: int) -> torch.Tensor:
    return make(seed, 2 * COUNT).view(-1, 2)[:, 0]


def equal(t: torch.Tensor, seed: int, maker: Any = make) -> bool:
    return torch.equal(t, maker(seed))


def borrowed(client: Client) -> dict[str, int]:
    """Bytes that each worker has read from another's memory."""
    return client.run(message_leases.bytes_read)


def readers(client: Client, lender: str) -> list[str]:
    def look(dask_worker):
        return sorted(peers._registries[dask_worker].readers)

    return client.run(look, workers=[lender])[lender]


def pass_one(client: Client, a: str, b: str, seed: int, maker: Any = make) -> bool:
    """A tensor from one worker to the other; whether it is what it was."""
    there = client.submit(maker, seed, workers=[a], pure=False)
    return client.submit(equal, there, seed, maker, workers=[b], pure=False).result(timeout=200)


def acquaint(client: Client, a: str, b: str) -> None:
    """Have two workers find out that one can read the other."""
    assert pass_one(client, a, b, 0)
    assert wait_until(lambda: readers(client, a) == [b])


def use(client: Client) -> tuple[Client, list[str]]:
    session(client)
    return client, sorted(client.nthreads())


@contextmanager
def without_handler(client: Client, worker: str, name: str) -> Iterator[None]:
    """As if this worker did not know what it is asked by this name."""

    def forget(dask_worker):
        dask_worker.kept = dask_worker.handlers.pop(name, None)

    def remember(dask_worker):
        if dask_worker.kept is not None:
            dask_worker.handlers[name] = dask_worker.kept

    client.run(forget, workers=[worker])
    try:
        yield
    finally:
        client.run(remember, workers=[worker])


def refuse_reads(least: int = 16) -> None:
    """Have all reads of this process fail that are for more bytes: by default than a token has."""
    stock = getattr(process_memory.read, "stock", process_memory.read)

    def read(pid, pieces):
        if sum(view.nbytes for _, view in pieces) > least:
            raise PermissionError("not today")
        stock(pid, pieces)

    read.stock = stock
    process_memory.read = read


def allow_reads() -> None:
    """Undo `refuse_reads`, if it was called."""
    process_memory.read = getattr(process_memory.read, "stock", process_memory.read)
