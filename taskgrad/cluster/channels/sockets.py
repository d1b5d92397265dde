"""Channels over TCP sockets of our own, one connection for each two workers, and for the driver.

A program's thread sends what the socket takes at once, and receives while it waits for a value: so
a small value needs no other thread on its way. While the program computes, or does not run, a
thread of the channels receives, and sends what is left of large values. Between processes of one
host that may read each other's memory, large values are read there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hmac
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from taskgrad.cluster.channels.frames import Arriving, Tag, pack, receipt
from taskgrad.cluster.channels.peer_devices import PeerDevices
from taskgrad.cluster.channels.socket_peer import SocketPeer
from taskgrad.cluster.wire import thresholds
from taskgrad.cluster.wire.leases import TOKEN_BYTES, BufferLease, ValidityToken

logger = logging.getLogger("taskgrad")

# How often the channels' thread looks after the connections of a program that computes. Small
# values wait in the system's memory; large ones do not fit there, and their senders wait.
_NAP_S, _SHORT_NAP_S = 0.05, 0.005
_EPOCH = struct.Struct("<Q")
_GUARD = struct.Struct(f"<{TOKEN_BYTES}sQ")
_CLOSED = 2**63  # later than any epoch
# The tags of messages about devices, and of those between driver and programs: of an epoch that
# never comes.
_DEVICES = (2**32 - 1, 0, 0)
DRIVER = (2**32 - 1, 1, 0)
# How long somebody who connects may take to say the group's name.
_STRANGER_S = 2.0
# What either end of a connection says first: its rank, and where the other can try to read.
_HELLO = struct.Struct(f"<IIQ{TOKEN_BYTES}s")


class SocketChannels:
    """This worker's channels to the others of a group.

    Parameters
    ----------
    name
        A name that only the group knows; who connects has to tell it.
    rank, size
        This worker's place among the workers, and their number. The driver may be one more, the
        last: it uses `reach` and `join` in place of `listen` and `connect`.
    lends
        True if other processes of this host may read large values in this one's memory.
    groups
        True if values on devices may go over process groups, which is NCCL between GPUs.
    deliver
        Called in a thread with the tag of each value that comes, and what `unpack` makes it from.
    lost
        Called in a thread with the rank of a worker whose connection has ended.
    sent
        Called in a thread when `has_sent` may have become true of a value, if anybody asks.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        lends: bool,
        groups: bool,
        deliver: Callable[[Tag, Any], None],
        lost: Callable[[int], None],
        sent: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name.encode()
        # Of no buffers: the others read its token, and behind it the oldest epoch of which values
        # may be read, to know whether what they have read was there.
        self._lease = BufferLease(bytes(_EPOCH.size))
        self._rank = rank
        self._size = size
        self._lends = lends
        self._groups = groups
        self._hosts: list[str] = []
        self._deliver = deliver
        self._lost = lost
        self._sent = sent
        self._listener: socket.socket | None = None
        self._peers: dict[int, SocketPeer] = {}
        self._reached: list[socket.socket] = []  # of a driver, which the others do not know yet
        self._selector = selectors.DefaultSelector()
        self._wakes, self._woken_by = socket.socketpair()
        self._selector.register(self._woken_by, selectors.EVENT_READ)
        for end in (self._wakes, self._woken_by):
            end.setblocking(False)
        self._polling = threading.Lock()  # held by the thread that looks after the connections
        self._attended = False  # by a program, whenever it waits
        self._waits = False  # the program does
        self._woken = False  # it has to look again at what it waits for
        self._hurry = threading.Event()  # ends the nap of the channels' thread
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="taskgrad-channels", daemon=True)

    # -- opening and closing ---------------------------------------------------------------------

    def listen(self, host: str) -> int:
        """Listen for the others at the address that they know of this host; returns the port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=self._size)
        except OSError:  # the address is translated on the way here
            self._listener = socket.create_server(("", 0), family=family, backlog=self._size)
        port: int = self._listener.getsockname()[1]
        return port

    def connect(self, addresses: Sequence[tuple[str, int]], seconds: float) -> None:
        """Connect to all others, who do the same; raises OSError if that takes longer.

        Of a driver, which comes last if it takes part, the address does not matter.
        """
        assert self._listener is not None
        until = time.monotonic() + seconds
        self._hosts = [host for host, _ in addresses]
        with self._listener as listener:
            for rank in range(self._rank):
                found = socket.create_connection(addresses[rank], _left(until))
                found.sendall(self._name)
                self._add(found, *self._introduce(found))
            while len(self._peers) < len(addresses) - 1:
                listener.settimeout(_left(until))
                found, _ = listener.accept()
                found.settimeout(min(_STRANGER_S, _left(until)))
                with contextlib.suppress(EOFError, OSError):
                    if hmac.compare_digest(_receive(found, len(self._name)), self._name):
                        self._add(found, *self._introduce(found))
                    else:
                        found.close()
        self._thread.start()

    def reach(self, addresses: Sequence[tuple[str, int]], seconds: float) -> None:
        """For a driver, once all listen: connect to them; raises OSError if that takes longer.

        They wait for nothing else it says, so that it may serve one after the other.
        """
        until = time.monotonic() + seconds
        for address in addresses:
            found = socket.create_connection(address, _left(until))
            self._reached.append(found)
            found.sendall(self._name + _HELLO.pack(self._rank, *self._lease.token) + b"n")

    def join(self, seconds: float) -> None:
        """For a driver, once all connect: hear who they are; raises OSError or EOFError."""
        until = time.monotonic() + seconds
        for found in self._reached:
            found.settimeout(_left(until))
            rank, *about = _HELLO.unpack(_receive(found, _HELLO.size))
            _receive(found, 1)
            self._add(found, rank, ValidityToken(*about), False)
        self._reached.clear()
        self._thread.start()

    def _introduce(self, connection: socket.socket) -> tuple[int, ValidityToken, bool]:
        """Who is at the other end: rank and token, and whether it can read this process."""
        pid, address, content = self._lease.token
        connection.sendall(_HELLO.pack(self._rank, pid, address, content))
        rank, *about = _HELLO.unpack(_receive(connection, _HELLO.size))
        token = ValidityToken(*about)
        lends = self._lends and self._on_host_of(rank)
        connection.sendall(b"y" if lends and token.is_readable() else b"n")
        return rank, token, _receive(connection, 1) == b"y" and lends

    def _add(self, connection: socket.socket, rank: int, token: ValidityToken, reads: bool) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        devices = PeerDevices(
            int(rank < self._rank),
            self._lends and self._on_host_of(rank),
            self._groups and rank < self._size,  # not with the driver
            lambda message: self._send(self._peers[rank], pack(_DEVICES, message).buffers),
        )
        peer = self._peers[rank] = SocketPeer(rank, connection, token, reads, devices)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def close(self, seconds: float) -> None:
        """Close all connections; waits at most so long for the thread that looks after them."""
        self._closing = True
        self._interrupt()
        self._hurry.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        self.forget(_CLOSED)
        for peer in self._peers.values():
            peer.close()
        for found in self._reached:
            found.close()
        if self._listener is not None:
            self._listener.close()
        self._lease.end()
        self._selector.close()
        self._wakes.close()
        self._woken_by.close()

    # -- for the program -------------------------------------------------------------------------

    def unpack(self, arrived: tuple[SocketPeer, Arriving]) -> Any:
        """The value that was delivered; OSError if it is lent, and the sender has it no more."""
        peer, value = arrived
        lent = value.is_lent
        if lent:
            pid, address, content = peer.token
            dropped = ConnectionError(
                "another worker has dropped a value before it was read there: its program was "
                "stopped. Take the step again"
            )
            try:
                token, oldest = _GUARD.unpack(value.read(pid, address, _GUARD.size))
            except OSError as error:
                if error.errno == errno.EFAULT:  # even the memory is gone
                    raise dropped from error
                raise
            if token != content or oldest > value.tag[0]:
                raise dropped
        try:
            return value.value()
        finally:
            if lent or value.is_placed:
                self._send(peer, [receipt(value.tag)])

    def send(self, peer: int, tag: Tag, value: Any, *, lend_min: int | None = None) -> None:
        """Send a value, whose memory stays as it is until it has arrived.

        Parts of `lend_min` bytes or more, by default `LEND_MIN`, may be read there.
        """
        found = self._peers[peer]
        least = thresholds.LEND_MIN if lend_min is None else lend_min
        lend = least if found.reads else None
        packed = pack(tag, value, lend=lend, carrier=found.devices.carrier())
        if packed.lent:
            found.lent[tag] = packed.lent
        if packed.placed:
            found.placed[tag] = packed.placed
        self._send(found, packed.buffers)
        if found.devices.is_busy:  # the peer may ask for the rest while this program computes
            self._hurry.set()

    def post(self, messages: Sequence[Any]) -> None:
        """For a driver: have the channels' thread send each program a message.

        The thread that calls this does not send: an interrupt would not tell how much was sent.
        Raises what pickling a message raises; nothing is sent then.
        """
        packed = [pack(DRIVER, message).buffers for message in messages]
        for rank, buffers in enumerate(packed):
            self._peers[rank].put(buffers)
        self._interrupt()

    def has_posted(self) -> bool:
        """True if all that was posted has been sent, or will never be."""
        return not any(peer.is_sending for peer in self._peers.values())

    def has_sent(self, peer: int, tag: Tag) -> bool:
        """True if the memory of a value that was sent is not needed any more."""
        found = self._peers[peer]
        return not (tag in found.lent or tag in found.placed or found.is_sending)

    def _on_host_of(self, rank: int) -> bool:
        return self._hosts[rank] == self._hosts[self._rank]

    def _send(self, peer: SocketPeer, buffers: Sequence[memoryview]) -> None:
        with contextlib.suppress(OSError):  # the peer is gone, as who reads from it finds
            if peer.send(buffers):  # and with these what was left before
                self._sent()
            else:
                self._hurry.set()
                if self._polling.locked():
                    self._interrupt()

    def forget(self, epoch: int) -> None:
        """Drop what was sent in earlier epochs; who reads it now finds that out."""
        at = self._lease.token.address + TOKEN_BYTES
        ctypes.memmove(at, _EPOCH.pack(epoch), _EPOCH.size)
        for peer in self._peers.values():
            for tag in [*peer.lent, *peer.placed]:
                if tag[0] < epoch:
                    peer.drop(tag)

    def attend(self, on: bool) -> None:
        """From now on a program runs, and calls `wait` whenever it waits; or it ends."""
        self._attended = on
        if not on:
            self._hurry.set()

    def wait(self, seconds: float) -> None:
        """Wait until a value has come, or `wake` was called since the last time, or so long."""
        self._waits = True
        try:
            if not self._polling.acquire(blocking=False):
                self._interrupt()
                self._polling.acquire()
            try:
                if not self._woken and not self._closing:
                    self._poll(seconds)
            finally:
                self._polling.release()
        finally:
            self._waits = self._woken = False

    def wake(self) -> None:
        """End the program's wait; any thread may call."""
        self._woken = True
        if self._waits:
            self._interrupt()

    def _interrupt(self) -> None:
        with contextlib.suppress(OSError):  # it was interrupted before, or is closed
            self._wakes.send(b"!")

    # -- in whichever thread looks after the connections -----------------------------------------

    def _serve(self) -> None:
        """Look after the connections while the program does not."""
        while not self._closing:
            if self._waits or (self._attended and not self._is_halfway()):
                large = any(peer.gets_large for peer in self._peers.values())
                self._hurry.wait(_SHORT_NAP_S if large else _NAP_S)
                self._hurry.clear()
                seconds: float | None = 0.0
            else:
                seconds = None
            if self._polling.acquire(blocking=seconds is None):
                try:
                    if not self._waits and self._poll(seconds):
                        self.wake()
                finally:
                    self._polling.release()

    def _is_halfway(self) -> bool:
        return any(peer.is_halfway for peer in self._peers.values())

    def _poll(self, seconds: float | None) -> bool:
        """Receive what comes, and send what is left, once; True if a value has come."""
        came = False
        for peer in self._peers.values():
            if peer.is_sending:
                self._write(peer)
        for key, events in self._selector.select(seconds):
            peer = key.data
            if peer is None:
                with contextlib.suppress(OSError):
                    self._woken_by.recv(1 << 10)
                continue
            if events & selectors.EVENT_WRITE:
                self._write(peer)
            if events & selectors.EVENT_READ:
                try:
                    for arrived in peer.receive():
                        for value in self._readable(peer, arrived):
                            self._deliver(value.tag, (peer, value))
                            came = True
                except OSError:
                    self._end(peer)
        return came

    def _readable(self, peer: SocketPeer, arrived: Arriving) -> list[Arriving]:
        """The values that can be read now that this is here; OSError if devices cannot go on."""
        if arrived.is_receipt:
            peer.drop(arrived.tag)
            self._sent()
            return []
        try:
            if arrived.tag == _DEVICES:
                return peer.devices.hear(arrived.value())
            return peer.devices.came(arrived)
        except Exception as error:
            logger.exception("taskgrad cannot send or receive values on a device")
            raise ConnectionError("values on a device cannot be sent or received") from error

    def _write(self, peer: SocketPeer) -> None:
        """Send what is left for a peer, and have the selector say when it takes more."""
        with contextlib.suppress(OSError):  # who reads from it finds that it is gone
            if peer.flush():
                self._sent()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.is_sending else 0)
        with contextlib.suppress(KeyError, ValueError):  # it has gone
            if self._selector.get_key(peer.connection).events != wanted:
                self._selector.modify(peer.connection, wanted, peer)

    def _end(self, peer: SocketPeer) -> None:
        self._selector.unregister(peer.connection)
        peer.close()
        if not self._closing:
            self._lost(peer.rank)


def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes; EOFError if the connection ends before."""
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            connection.close()
            raise EOFError
        found += part
    return found


def _left(until: float) -> float:
    """The seconds until then; TimeoutError if there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("connecting took too long")
    return seconds
