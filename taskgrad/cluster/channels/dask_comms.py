"""Worker: channels over Dask's own connections, which are encrypted where the cluster's are.

A worker opens one connection to each other one, on which it only sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from distributed import Worker
from distributed.comm.core import Comm, connect
from distributed.core import Status
from distributed.protocol.serialize import to_serialize

from taskgrad.cluster.channels.frames import Tag

CHANNEL = "taskgrad_channel"
"""A worker's handler for the connections of others."""


class DaskChannels:
    """This worker's channels to the others of a group; see `SocketChannels`.

    Everything but `send` runs in the worker's event loop.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        rank: int,
        deliver: Callable[[Tag, Any], None],
        lost: Callable[[int], None],
    ) -> None:
        self._worker = worker
        self._name = name
        self._rank = rank
        self._deliver = deliver
        self._lost = lost
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._writers: list[asyncio.Task[None]] = []
        self._comms: list[Comm] = []
        self._closing = False
        self._woken = threading.Event()

    async def connect(self, addresses: list[str], seconds: float) -> None:
        """Connect to all others; raises OSError if that takes longer."""
        for peer, address in enumerate(addresses):
            if peer != self._rank:
                comm = await connect(address, seconds, **self._worker.connection_args)
                self._comms.append(comm)
                hello = {"op": CHANNEL, "name": self._name, "rank": self._rank, "reply": False}
                await comm.write(hello)
                self._queues[peer] = asyncio.Queue()
                self._writers.append(asyncio.create_task(self._write(peer, comm)))

    @staticmethod
    def unpack(value: Any) -> Any:
        """The value that was delivered."""
        return value

    def send(self, peer: int, tag: Tag, value: Any) -> None:
        """Send a value, whose memory stays as it is until it has arrived. Any thread may call."""
        loop: Any = self._worker.loop
        loop.asyncio_loop.call_soon_threadsafe(self._queues[peer].put_nowait, (tag, value))

    def forget(self, epoch: int) -> None:
        """Nothing to do: what was sent is not kept."""

    def attend(self, on: bool) -> None:
        """Nothing to do: the event loop receives, whether a program runs or not."""

    def wait(self, seconds: float) -> None:
        """Wait until a value has come, or `wake` was called since the last time, or so long."""
        self._woken.wait(seconds)
        self._woken.clear()

    def wake(self) -> None:
        """End the program's wait; any thread may call."""
        self._woken.set()

    async def _write(self, peer: int, comm: Comm) -> None:
        try:
            while True:
                tag, value = await self._queues[peer].get()
                await comm.write({"tag": tag, "value": to_serialize(value)})
                del value
        except OSError:
            if not self._closing:
                self._lost(peer)

    async def receive(self, comm: Comm, rank: int) -> Any:
        """Deliver all that comes on another worker's connection, until it ends."""
        try:
            while True:
                message: Any = await comm.read()
                self._deliver(tuple(message["tag"]), message["value"])
                self.wake()
                del message
        except OSError:
            if not self._closing:
                self._lost(rank)
        return Status.dont_reply

    async def close(self) -> None:
        """Close all connections."""
        self._closing = True
        for writer in self._writers:
            writer.cancel()
        for comm in self._comms:
            with contextlib.suppress(OSError):
                await comm.close()
