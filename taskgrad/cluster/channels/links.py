"""Worker: messages between ranks that run as tasks, or several on a worker, over channels.

A link stays as long as its driver wants, whichever ranks run. The thread of the channels puts what
comes into mailboxes; a message for several ranks of a worker is sent there once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from taskgrad.cluster.channels.frames import Tag
from taskgrad.cluster.channels.sockets import SocketChannels
from taskgrad.cluster.wire import thresholds
from taskgrad.worker.mailbox import Mailboxes, Message, TaskOutcome

logger = logging.getLogger("taskgrad")

_COUNT = 1 << 32

Sent = Future[list[TaskOutcome | None]]


class Link:
    """This worker's messages to ranks on the others, whose `addresses` are in order."""

    def __init__(
        self, channels: SocketChannels, addresses: Sequence[str], mailboxes: Mailboxes
    ) -> None:
        self._channels = channels
        self._place = {address: i for i, address in enumerate(addresses)}
        self._mailboxes = mailboxes
        self._numbers = itertools.count()
        self._under_way: dict[Tag, tuple[int, Sent, int]] = {}
        self._gone: set[int] = set()
        self._lock = threading.Lock()  # held to change these two

    def reaches(self, worker: str) -> bool:
        """True if messages to this worker can be sent."""
        place = self._place.get(worker)
        return place is not None and place not in self._gone

    def send(self, worker: str, messages: Sequence[tuple[str, Message]]) -> Sent:
        """Deliver messages; see `taskgrad.worker.mailbox.Transport`. Says nothing of ended tasks.

        The result comes when the messages' memory is no longer read.
        """
        place, tag, sent = self._place[worker], (0, 0, next(self._numbers) % _COUNT), Sent()
        # A tensor that several have is pickled once.
        self._channels.send(
            place,
            tag,
            [(key, *message) for key, message in messages],
            lend_min=thresholds.LEND_TO_RANK_MIN,
        )
        with self._lock:  # not before: `sent` would take it for one that has been sent
            self._under_way[tag] = place, sent, len(messages)
        if place in self._gone:
            self.lost(place)
        else:
            self.sent()
        return sent

    def sent(self) -> None:
        """Some memory is no longer read."""
        with self._lock:
            waiting = self._under_way.items()
            done = [tag for tag, (at, *_) in waiting if self._channels.has_sent(at, tag)]
            found = [self._under_way.pop(tag) for tag in done]
        for _, sent, count in found:
            sent.set_result([None] * count)

    def deliver(self, arrived: Any) -> None:
        """Messages have come: read them, and put them into mailboxes; OSError if that fails."""
        try:
            messages = self._channels.unpack(arrived)
        except Exception as error:
            logger.exception("taskgrad cannot read a message of a rank")
            raise ConnectionError("a message cannot be read") from error
        for key, *message in messages:
            self._mailboxes.deliver(key, Message._make(message))

    def lost(self, place: int) -> None:
        """The connection to a worker has ended."""
        with self._lock:
            self._gone.add(place)
            ended = [tag for tag, (at, *_) in self._under_way.items() if at == place]
            found = [self._under_way.pop(tag) for tag in ended]
        for _, sent, _ in found:
            sent.set_exception(ConnectionError("the connection has ended"))

    def close(self) -> None:
        """The driver needs the link no more."""
        for place in self._place.values():
            self.lost(place)
