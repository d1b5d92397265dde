"""All goes over Dask's own wires, TLS if the cluster has it; nothing of ours opens another door."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from distributed.security import Security
from torch import nn

import taskgrad as tg
from helpers import assert_same, assert_vjp_equals_torch


def train(client):
    """Something of everything: inputs small and large, spawns, backwards, an optimizer, state."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    chain = tg.GraphChain(model, client=client, placement=[0, 0, 1])
    optimizer = tg.Optimizer(chain, torch.optim.SGD)
    for rows in (4, 1 << 16):
        loss = tg.spawn(F.mse_loss, chain(torch.randn(rows, 8)), torch.zeros(rows, 4))
        loss.backward()
        optimizer.step()
    F.mse_loss(tg.collect(chain(torch.randn(4, 8))), torch.zeros(4, 4)).backward()
    chain.load_state_dict(chain.state_dict())
    chain.to_module()
    return chain


@pytest.fixture(scope="module")
def secure():
    security = Security.temporary()
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            protocol="tls://",
            security=security,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_everything_works_over_tls(secure):
    workers = secure.nthreads()
    assert all(address.startswith("tls://") for address in [secure.scheduler.address, *workers])
    chain = train(secure)
    assert chain.memory().column("parameters")
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    placed = tg.GraphChain(model, client=secure, placement=[0, 0, 1])
    assert_vjp_equals_torch(placed, model, torch.randn(3, 8))
    layer = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert_same(tg.collect(tg.spawn(layer, x)).detach(), layer(x).detach())


class Listener:
    """Reads all that passes the loopback interface."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("lo", 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
        self._socket.settimeout(0.2)
        self.heard = bytearray()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                self.heard += self._socket.recv(1 << 17)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        time.sleep(0.5)  # the last packets
        self._ended.set()
        self._thread.join()
        self._socket.close()


class Constant(nn.Module):
    """Returns its input as it is, with the same gradient, large enough to travel by itself."""

    def forward(self, x):
        return x * 1.0


# As float32, four bytes that nothing else has in a row.
NUMBER = 1.2345678e-13


@pytest.mark.parametrize(
    ("executor", "tls"), [("compiled", True), ("compiled", False), ("futures", True)]
)
def test_no_tensor_passes_in_the_clear(secure, client, executor, tls):
    one = secure if tls else client
    model = nn.Sequential(Constant(), nn.Linear(64, 1), Constant())
    chain = tg.GraphChain(model, client=one, placement=[0, 1, 0])
    sgd = partial(torch.optim.SGD, lr=0.0)
    with Listener() as listener:
        trainer = tg.Trainer(chain, F.mse_loss, sgd, microbatches=2, executor=executor)
        for _ in range(3):
            trainer.step(torch.full((64, 64), NUMBER), torch.zeros(64, 1)).item()
    heard = struct.pack("<f", NUMBER) * 8 in listener.heard
    assert heard is not tls


# What Python and torch do when modules are imported: torch's optimizers import its compiler.
_NOT_OURS = ("__pycache__", "torchinductor")


def record(dask_worker):
    """Write down from now on what the worker's process listens on, connects to, and writes."""
    seen = dask_worker.seen_in_test = []
    tempfile.gettempdir()  # the first time, Python tries whether it can write there

    def hook(event, arguments):
        if event in ("socket.bind", "socket.connect"):
            seen.append((event, str(arguments[1])))
        elif event == "open" and isinstance(arguments[0], str):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                seen.append(("write", os.path.abspath(arguments[0])))
        elif event in ("os.mkdir", "os.rename", "subprocess.Popen", "os.system"):
            seen.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    return dask_worker.local_directory


def test_workers_open_no_port_and_write_nowhere_else(fresh):
    client = fresh(n_workers=2)
    folders = client.run(record)
    ours = {address.removeprefix("tcp://").partition(":")[2] for address in folders}
    ours.add(client.scheduler.address.rpartition(":")[2])
    train(client)
    found = client.run(lambda dask_worker: dask_worker.seen_in_test)
    assert any(what == "socket.connect" for seen in found.values() for what, _ in seen)
    for address, seen in found.items():
        for what, where in seen:
            if what == "socket.connect":
                assert any(port in where for port in ours), where
            elif not any(own in where for own in _NOT_OURS):
                assert what == "write", (what, where)
                assert where == os.devnull or where.startswith(folders[address]), where
