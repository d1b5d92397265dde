"""Worker: messages between the ranks of a training step, over the channels of its programs."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from taskgrad.cluster.channels.dask_comms import DaskChannels
from taskgrad.cluster.channels.frames import Tag
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.graph.calls import Rank
from taskgrad.graph.copies import own_copy
from taskgrad.worker.backward import Backward
from taskgrad.worker.forward import Forward
from taskgrad.worker.mailbox import Mailboxes, Message
from taskgrad.worker.rank_channels import having

_FIRST = 3 << 30
"""The third numbers of tags from here on are those of these messages."""
_COUNT = 1 << 29


class StepMail:
    """The messages of one worker's program to the others', whose `addresses` are in order.

    A step has many ranks, one after the other. A message has the key of the one that it is for, and
    goes into that one's mailbox whichever rank waits.
    """

    def __init__(
        self,
        channels: SocketChannels | DaskChannels,
        addresses: Sequence[str],
        mailboxes: Mailboxes,
    ) -> None:
        self._channels = channels
        self._place = {address: i for i, address in enumerate(addresses)}
        self._mailboxes = mailboxes
        self._arrived: deque[tuple[Tag, Any]] = deque()
        self._numbers = itertools.count()

    @staticmethod
    def is_for(tag: Tag) -> bool:
        """True if a value with this tag is such a message."""
        return tag[2] >= _FIRST

    def during(self, action: Any, epoch: int, step: int) -> AbstractContextManager[None]:
        """A block in which this action of a step runs, which may be a rank."""
        rank: Rank | None = None
        peers: tuple[str, ...] = ()
        if isinstance(action, Forward) and action.call.context is not None:
            rank, peers = action.call.rank, action.call.peers
        elif isinstance(action, Backward):
            rank, peers = action.rank, action.peers
        if rank is None:
            return nullcontext()
        places = [self._place[worker.address] for worker in rank.group.workers]
        return having(_Channels(self, (epoch, step), places, peers))

    def deliver(self, tag: Tag, arrived: Any) -> None:
        """A message has come; a rank that waits reads it. Any thread may call."""
        self._arrived.append((tag, arrived))

    def send(self, place: int, call: tuple[int, int], message: Any) -> Callable[[], bool]:
        """Send a message to a worker; the function tells whether its memory is no longer read."""
        channels, tag = self._channels, (*call, _FIRST + next(self._numbers) % _COUNT)
        if isinstance(channels, DaskChannels):  # nothing says when Dask has sent it
            channels.send(place, tag, own_copy(message))
            return lambda: True
        channels.send(place, tag, message)
        return lambda: channels.has_sent(place, tag)

    def receive(self, epoch: int, seconds: float) -> None:
        """Put what has come into mailboxes; if there is nothing, wait so long, or until `wake`."""
        if not self._arrived:
            self._channels.wait(seconds)
        while self._arrived:
            tag, arrived = self._arrived.popleft()
            if tag[0] >= epoch:  # else it may be gone where it was sent
                key, *message = self._channels.unpack(arrived)
                self._mailboxes.deliver(key, Message._make(message))

    def wake(self) -> None:
        """End the wait of `receive`."""
        self._channels.wake()

    def close(self) -> None:
        """Drop what has come."""
        self._arrived.clear()


class _Channels:
    """A `taskgrad.worker.rank_channels.RankChannels` of one action.

    By rank, `places` are those of the workers, and `keys` those of their actions.
    """

    def __init__(
        self, mail: StepMail, call: tuple[int, int], places: Sequence[int], keys: Sequence[str]
    ) -> None:
        self._mail = mail
        self._call = call
        self._places = places
        self._keys = keys

    def send(self, rank: int, message: Message) -> Callable[[], bool]:
        """Send a message to a rank; see `RankChannels`."""
        return self._mail.send(self._places[rank], self._call, (self._keys[rank], *message))

    def receive(self, seconds: float) -> list[Message]:
        """Wait; what comes is put into mailboxes here. See `RankChannels`."""
        self._mail.receive(self._call[0], seconds)
        return []

    def wake(self) -> None:
        """End the wait of `receive`."""
        self._mail.wake()
