"""The socket to one other worker: what is left to be sent on it, and what has come."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import deque
from collections.abc import Sequence

from taskgrad.cluster.channels.device_slots import Placed
from taskgrad.cluster.channels.frames import Arriving, Stream, Tag
from taskgrad.cluster.channels.peer_devices import PeerDevices
from taskgrad.cluster.wire.leases import ValidityToken

_MOST_BUFFERS = 512  # that are sent at once; systems have a limit, often of 1024


class SocketPeer:
    """The connection to another worker, or to the driver.

    `token` is at an address of its process, and `reads` true if that can read this one's memory;
    `lent` is what it is to read there, and `placed` in slots of `devices`.
    """

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        token: ValidityToken,
        reads: bool,
        devices: PeerDevices,
    ) -> None:
        self.rank = rank
        self.connection = connection
        self.token = token
        self.reads = reads
        self.lent: dict[Tag, list[memoryview]] = {}
        self.devices = devices
        self.placed: dict[Tag, list[Placed]] = {}
        self._stream = Stream()
        self._left: deque[memoryview] = deque()  # to be sent
        self._sending = threading.Lock()

    def drop(self, tag: Tag) -> None:
        """What was sent for this tag has been read, or never will be."""
        self.lent.pop(tag, None)
        for placed in self.placed.pop(tag, ()):
            self.devices.slots.give_back(placed)

    @property
    def gets_large(self) -> bool:
        """True if a large value has come on this connection."""
        return self._stream.has_had_large

    @property
    def is_sending(self) -> bool:
        """True if something is left to be sent."""
        return bool(self._left)

    @property
    def is_halfway(self) -> bool:
        """True if a value is on its way."""
        return bool(self._left) or self._stream.is_halfway or self.devices.is_busy

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send these bytes after what is left; False if some are left of them, too."""
        with self._sending:
            self._left.extend(buffers)
            return self._flush()

    def put(self, buffers: Sequence[memoryview]) -> None:
        """Leave these bytes to be sent by `flush`."""
        self._left.extend(buffers)

    def flush(self) -> bool:
        """Send what the connection takes now; True if nothing is left."""
        with self._sending:
            return self._flush()

    def _flush(self) -> bool:
        left = self._left
        while left:
            try:
                sent = _send(self.connection, left)
            except BlockingIOError:
                return False
            except OSError:
                left.clear()
                raise
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if sent:
                left[0] = left[0][sent:]
        return True

    def receive(self) -> list[Arriving]:
        """The values that are complete with what is there; ConnectionError if it has ended."""
        found: list[Arriving] = []
        while True:
            room = self._stream.room()
            try:
                count = self.connection.recv_into(room)
            except BlockingIOError:
                return found
            if not count:
                if found:
                    return found
                raise ConnectionResetError
            found.extend(self._stream.received(room, count))
            if count < len(room):
                return found

    def close(self) -> None:
        """Close the connection; what is left for it is dropped."""
        with self._sending:
            self._left.clear()
            self.connection.close()
        self.placed.clear()
        self.devices.close()


def _send(connection: socket.socket, buffers: deque[memoryview]) -> int:
    """Send what the connection takes of these; returns the number of bytes."""
    if hasattr(connection, "sendmsg"):
        return connection.sendmsg(itertools.islice(buffers, _MOST_BUFFERS))
    return connection.send(buffers[0])  # on Windows
