"""Driver: the ways to programs on some workers, and back.

To each worker there is a connection of Dask's, which tells either end that the other is gone.
Where the workers' channels are sockets the driver takes part in them, and messages go that way:
from the thread that takes steps to the one that computes, with no event loop between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Client
from distributed.comm.addressing import get_address_host
from distributed.comm.core import Comm, connect

from taskgrad.cluster import client_calls, internals
from taskgrad.cluster.changes import Changes
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.cluster.config import deadline, device_groups
from taskgrad.cluster.program_hosts import PROGRAM
from taskgrad.cluster.wire import message_values

# Up to so many bytes Dask need not look at a message to tell whether a thread should serialize it.
_AT_ONCE_MAX = 1 << 20
# Inputs of up to so many bytes are copied; the call returns before larger ones are sent.
_COPIED_MAX = 1 << 18
# Each of two ways to connect workers may take this part of the time that an answer may.
_TRIES = 3
_SOCKETS_S = 10.0  # for the first way at most: a firewall may drop what it does not let pass
_DRIVER_S = 3.0  # and for the driver's own sockets
_CLOSE_S = 5.0  # for the thread of the sockets to end

logger = logging.getLogger("taskgrad")

Hear = Callable[[], Callable[[int, dict[str, Any]], None] | None]
"""Returns what is called with a worker's rank and message, in some thread; None if it is gone."""


class ProgramComms:
    """Messages to and from one program on each of some workers.

    Parameters
    ----------
    hear
        Called with what a worker says. Of ours are ``{"op": "gone"}``, its connection has ended,
        and ``{"op": "unreadable", "error": error}``, what it said raises this when it is unpickled.
    """

    def __init__(self, client: Client, name: str, workers: Sequence[str], hear: Hear) -> None:
        self._client = client
        self._name = name
        self._workers = workers
        self._hear = hear
        self._posted = Changes()  # notified when messages have been sent
        self._comms: list[Comm] = []
        self._locks: list[asyncio.Lock] = []
        self._readers: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()
        self._sockets: SocketChannels | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """What the workers know the program by."""
        return self._name

    # -- opening and closing ---------------------------------------------------------------------

    def open(self, tokens: Sequence[str], named: Callable[[str], Any], *, links: bool) -> None:
        """Connect to the workers, and have them connect; raises OSError or TaskgradError.

        `named` gives a worker's name, for messages.
        """
        problem = client_calls.call_with_deadline(
            self._client, lambda: self._open(tokens, named, links), "to connect for programs"
        )
        if problem:
            raise OSError(problem)

    async def _open(self, tokens: Sequence[str], named: Callable[[str], Any], links: bool) -> str:
        """As `open`; returns why it failed, or ""."""
        # TLS is a matter of Dask's own connections.
        plain = all(address.startswith("tcp://") for address in self._workers)
        problem = await self._open_channels(plain, tokens, named, links) if plain else "not tried"
        if problem and not links:
            if plain and self._comms:
                logger.info("training steps send values over Dask's own connections: %s", problem)
                self._name += "-dask"
            await self._close_comms()
            problem = await self._open_channels(False, tokens, named, links)
        if not problem:
            self._readers += [
                asyncio.create_task(self._listen(rank, comm))
                for rank, comm in enumerate(self._comms)
            ]
        return problem

    async def _open_channels(
        self, sockets: bool, tokens: Sequence[str], named: Callable[[str], Any], links: bool
    ) -> str:
        """As `_open`, with channels over sockets, or over Dask's own connections."""
        seconds = deadline("answer") / _TRIES
        if sockets:
            seconds = min(seconds, _SOCKETS_S)
        comms = self._comms
        try:
            for rank, address in enumerate(self._workers):
                comm = await connect(address, seconds, **self._client.connection_args)
                comms.append(comm)
                self._locks.append(asyncio.Lock())
                about = {
                    "rank": rank,
                    "addresses": self._workers,
                    "sockets": sockets,
                    "groups": device_groups(),
                    "tokens": tokens[rank : rank + 1],
                    "links": links,
                }
                hello = {"op": PROGRAM, "name": self._name, "client": self._client.id, **about}
                await comm.write(hello)
            if len(comms) == 1 and not sockets:
                return ""
            where: dict[str, Any] = {}
            if sockets:
                for comm in comms:
                    await comm.write({"op": "listen"})
                ports = [(await _read(comm))["port"] for comm in comms]
                where = {"ports": ports, "driver": not links and await self._reach(ports, seconds)}
            for comm in comms:
                await comm.write({"op": "connect", "seconds": seconds, **where})
            for address, comm in zip(self._workers, comms, strict=True):
                problem = (await _read(comm))["error"]
                if problem:
                    return f"{named(address)} cannot be connected with the others: {problem}"
            if self._sockets is not None:
                await _in_thread(self._sockets.join, seconds)
        except (OSError, EOFError) as error:
            return str(error)
        return ""

    async def _reach(self, ports: Sequence[int], seconds: float) -> bool:
        """Whether the driver reaches the workers' sockets; else messages go over Dask."""
        count = len(self._workers)
        # This object lives as long as its connections do, but not for the sake of their thread.
        this = weakref.ref(self)

        def deliver(_: Any, arrived: Any) -> None:
            found = this()
            if found is not None:
                found._arrived(*arrived)

        def lost(rank: int) -> None:
            found = this()
            if found is not None:
                found._gone(rank)

        channels = SocketChannels(
            self._name, count, count + 1, False, False, deliver, lost, self._posted.notify_all
        )
        hosts = map(get_address_host, self._workers)
        try:
            where = list(zip(hosts, ports, strict=True))
            await _in_thread(channels.reach, where, min(seconds, _DRIVER_S))
        except OSError as error:
            logger.info("messages of steps go over Dask's own connections: %s", error)
            channels.close(_CLOSE_S)
            return False
        self._sockets = channels
        return True

    async def _close_comms(self) -> None:
        if self._sockets is not None:
            await _in_thread(self._sockets.close, _CLOSE_S)
            self._sockets = None
        for comm in self._comms:
            with contextlib.suppress(OSError):
                await comm.write({"op": "close"})
                await comm.close()
        self._comms.clear()
        self._locks.clear()

    def close(self) -> None:
        """Close the connections, in the client's event loop if that still runs. Does not wait."""
        self._closed = True
        sockets, posted = self._sockets, self._posted

        def close_sockets() -> None:
            assert sockets is not None
            posted.wait_for(sockets.has_posted, _CLOSE_S)
            sockets.close(_CLOSE_S)

        if sockets is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and with it all threads
                threading.Thread(target=close_sockets, daemon=True).start()
        comms = self._comms

        async def close() -> None:
            for comm in comms:
                with contextlib.suppress(OSError):
                    await comm.write({"op": "close"})
                    await comm.close()

        if internals.loop_runs(self._client):
            loop: Any = self._client.loop
            asyncio.run_coroutine_threadsafe(close(), loop.asyncio_loop)
        else:  # the client is closed
            for comm in comms:
                with contextlib.suppress(Exception):
                    comm.abort()

    # -- to the workers --------------------------------------------------------------------------

    def packed(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of a step for each worker, serialized; raises what that raises."""
        if self._sockets is not None:
            return [message_values.pieces(list(given), _COPIED_MAX) for given in inputs]
        return [
            message_values.serialized(list(given), comm)
            for given, comm in zip(inputs, self._comms, strict=True)
        ]

    def send(self, messages: Sequence[dict[str, Any]], what: str) -> None:
        """Send each worker a message; blocks until their memory is no longer read.

        TaskgradError if that takes too long; `what` is for its message.
        """
        sockets = self._sockets
        if sockets is None:
            client_calls.call_with_deadline(self._client, lambda: self._write_all(messages), what)
            return
        self.post(messages)
        # Small messages are copies, but for what was left of large ones.
        shared = not all("inputs" not in m or m["inputs"].is_copy for m in messages)
        if shared and not self._posted.wait_for(sockets.has_posted, deadline("answer")):
            raise client_calls.unanswered(what)

    def post(self, messages: Sequence[dict[str, Any]]) -> None:
        """Send each worker a message, and do not wait; any thread may call."""
        if self._sockets is not None:
            self._sockets.post(messages)
        elif internals.loop_runs(self._client):
            self.in_loop(lambda: self._start(self._write_all(messages)))

    def in_loop(self, function: Callable[[], Any], delay: float = 0.0) -> None:
        """Call a function in the client's event loop, after so many seconds; does not wait."""
        loop: Any = self._client.loop
        asyncio_loop = loop.asyncio_loop
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            if delay:
                asyncio_loop.call_soon_threadsafe(asyncio_loop.call_later, delay, function)
            else:
                asyncio_loop.call_soon_threadsafe(function)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)  # asyncio itself keeps weak references only
        task.add_done_callback(self._background.discard)

    async def _write_all(self, messages: Sequence[dict[str, Any]]) -> None:
        await asyncio.gather(*(self._write(rank, m) for rank, m in enumerate(messages)))

    async def _write(self, rank: int, message: dict[str, Any]) -> None:
        async with self._locks[rank]:
            comm = self._comms[rank]
            given = message.get("inputs")
            large = given is not None and sum(map(len, given.frames)) > _AT_ONCE_MAX
            at_once = contextlib.nullcontext() if large else internals.writing_at_once(comm)
            with contextlib.suppress(OSError), at_once:  # its reader finds that it is gone
                await comm.write(message)

    # -- from the workers ------------------------------------------------------------------------

    async def _listen(self, rank: int, comm: Comm) -> None:
        """Read a worker's messages for as long as the connections are used."""
        while True:
            try:
                message: Any = await comm.read()
            except OSError:
                self._gone(rank)
                return
            self._heard(rank, message)
            del message

    def _arrived(self, peer: Any, arrived: Any) -> None:
        """A message has come over sockets; in their thread."""
        try:
            message = arrived.value()
        except Exception as error:
            message = {"op": "unreadable", "error": error}
        self._heard(peer.rank, message)

    def _gone(self, rank: int) -> None:
        self._heard(rank, {"op": "gone"})

    def _heard(self, rank: int, message: dict[str, Any]) -> None:
        hear = None if self._closed else self._hear()
        if hear is None:
            return
        if "reports" in message:
            try:
                message["reports"] = message_values.loads(message["reports"])
            except Exception as error:
                message = {"op": "unreadable", "error": error}
        hear(rank, message)


async def _read(comm: Comm) -> Any:
    return await comm.read()


async def _in_thread(function: Any, *args: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function, *args)
