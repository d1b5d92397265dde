"""Worker: messages between ranks, over the channels of the program that runs them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from taskgrad.cluster.channels.dask_comms import DaskChannels
from taskgrad.cluster.channels.frames import Tag
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.cluster.wire import thresholds
from taskgrad.graph.copies import own_copy
from taskgrad.worker.mailbox import Message
from taskgrad.worker.rank_channels import having

_FIRST = 1 << 31
"""The third numbers of tags from here on are those of messages between ranks."""


class RankMail:
    """The messages of one program's ranks, a `taskgrad.worker.rank_channels.RankChannels`.

    A message has the epoch and step of its call in its tag. It may come before its call begins, and
    is dropped when a later one does.
    """

    def __init__(self, channels: SocketChannels | DaskChannels) -> None:
        self._channels = channels
        self._arrived: dict[tuple[int, int], list[Any]] = {}
        self._lock = threading.Lock()
        self._call = (-1, -1)
        self._numbers = itertools.count(_FIRST)

    @staticmethod
    def is_for(tag: Tag) -> bool:
        """True if a value with this tag is a message between ranks."""
        return tag[2] >= _FIRST

    @contextlib.contextmanager
    def call(self, epoch: int, step: int) -> Iterator[None]:
        """A rank runs in the block."""
        with self._lock:
            self._call = epoch, step
            self._numbers = itertools.count(_FIRST)
            for call in [c for c in self._arrived if c < self._call]:
                del self._arrived[call]
        with having(self):
            yield

    def deliver(self, tag: Tag, arrived: Any) -> None:
        """A message has come; `receive` reads it."""
        with self._lock:
            if tag[:2] >= self._call:
                self._arrived.setdefault(tag[:2], []).append(arrived)

    def send(self, rank: int, message: Message) -> Callable[[], bool]:
        """Send a message to a rank; see `RankChannels`."""
        channels, tag = self._channels, (*self._call, next(self._numbers))
        if isinstance(channels, DaskChannels):  # nothing says when Dask has sent it
            channels.send(rank, tag, tuple(own_copy(message)))
            return lambda: True
        channels.send(rank, tag, tuple(message), lend_min=thresholds.LEND_TO_RANK_MIN)
        return lambda: channels.has_sent(rank, tag)

    def receive(self, seconds: float) -> list[Message]:
        """The messages that have come; see `RankChannels`."""
        if self._call not in self._arrived:
            self._channels.wait(seconds)
        with self._lock:
            arrived = self._arrived.pop(self._call, [])
        return [Message._make(self._channels.unpack(one)) for one in arrived]

    def wake(self) -> None:
        """End the wait of `receive`."""
        self._channels.wake()

    def close(self) -> None:
        """Drop what has come."""
        with self._lock:
            self._arrived.clear()
