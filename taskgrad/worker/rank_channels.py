"""Channels between the ranks of a call, where its workers have them: faster than the mailboxes'
transport, since the thread of a rank sends and receives itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from taskgrad.worker.mailbox import Message


class RankChannels(Protocol):
    """Channels from one rank to all others of its call."""

    def send(self, rank: int, message: Message) -> Callable[[], bool]:
        """Send a message; the function tells whether its memory is no longer read."""

    def receive(self, seconds: float) -> list[Message]:
        """The messages that have come, after waiting at most so long, or until `wake`."""

    def wake(self) -> None:
        """End the wait of `receive`; any thread may call."""


_here: ContextVar[RankChannels | None] = ContextVar("taskgrad_rank_channels", default=None)


def channels_here() -> RankChannels | None:
    """The channels of the rank that this thread runs; None if it has none."""
    return _here.get()


@contextmanager
def having(channels: RankChannels | None) -> Iterator[None]:
    """Ranks that begin in the block have these channels."""
    token = _here.set(channels)
    try:
        yield
    finally:
        _here.reset(token)
