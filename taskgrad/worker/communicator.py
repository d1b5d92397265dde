"""The rank that a thread runs, and how it exchanges messages with the other ranks of its group.

Every collective is an *exchange* among some ranks, its members: each sends every other one a
message, which says what it calls, and receives one from each. So every rank notices a member that
calls something else or has returned. A rank that waits returns its thread to the worker, so all
ranks of a call get a thread in the end, whatever else runs there.

A collective whose input takes a gradient is part of autograd's graph, and its backward is an
exchange again. All ranks must come to those in one order, even if one of them does not use the
result. So each recorded collective takes a *token* and returns the next, and a backward always
starts from the last one too (as XLA orders its effects).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from taskgrad.errors import CollectiveError
from taskgrad.graph.calls import Rank
from taskgrad.worker.forward_mode import shared_level
from taskgrad.worker.group_exchanges import GroupExchanges
from taskgrad.worker.mailbox import (
    GroupAborted,
    Mailboxes,
    Message,
    TaskOutcome,
)
from taskgrad.worker.rank_channels import having

_here: ContextVar[Communicator | None] = ContextVar("taskgrad_rank", default=None)


class Communicator:
    """One rank's side of its group, on its worker; its tape keeps it for the backward."""

    def __init__(self, rank: Rank, mailboxes: Mailboxes) -> None:
        self.rank = rank
        self.index = rank.index
        self.size = len(rank.group.workers)
        self.start = torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)
        self.token = self.start
        self.recorded: dict[Hashable, Any] = {}  # what its forward received, if that runs again
        self.mailboxes = mailboxes
        self._active: GroupExchanges | None = None

    @contextmanager
    def active(self, key: str, peers: Sequence[str]) -> Iterator[None]:
        """Run the task `key` of this rank in the block; `peers` are the tasks of all ranks.

        If the block raises, the other ranks raise the same error.
        """
        exchange = GroupExchanges(self.rank, self.mailboxes, key, peers)
        token = _here.set(self)
        self._active = exchange
        self.mailboxes.open(key, exchange.lost, exchange.wake, exchange.has_begun)
        error: BaseException | None = None
        try:
            with shared_level(), having(None):  # these are for no rank inside this one
                yield
        except GroupAborted as failed:
            error = failed.error
            raise error.with_traceback(None) from error.__cause__
        except BaseException as own:
            error = own
            exchange.tell_all(own)
            raise
        finally:
            exchange.flush()
            self.mailboxes.end(key, TaskOutcome(exchange.number, error))
            self._active = None
            _here.reset(token)

    def exchange(
        self,
        what: str,
        wants: bool,
        payloads: Sequence[list[Any]],
        members: Sequence[int] | None = None,
    ) -> list[Message]:
        """Send each member its payload, a list of tensors, and return what each has sent to this.

        `what` is the collective with its arguments, as text: the same on all members. `wants` is
        True if this rank needs a gradient for what it sends. `members` are the indices of the ranks
        that take part, this one included, by default all; payloads and messages are in their order.

        Raises CollectiveError if another member calls something else, or has returned, or does not
        come in time.
        """
        members = tuple(range(self.size)) if members is None else tuple(members)
        return self._running(what).exchange(what, wants, payloads, members)

    def inner_keys(self, what: str, size: int) -> list[str]:
        """The keys of the ranks of one more map, `what`, that each rank of the group makes inside.

        `size` is how many ranks it has in each. They are in rank order, this rank's among them.
        """
        return self._running(what).inner_keys(size)

    def _running(self, what: str) -> GroupExchanges:
        if self._active is None:
            raise CollectiveError(
                f"{what} of {self.rank} was called when its function had returned: a collective "
                "works while the function runs, in its own thread"
            )
        return self._active

    def keep_no_thread(self) -> None:
        """Leave the worker's pool of threads now: a later wait may be in a thread of torch's."""
        if self._active is not None:
            self._active.give_thread_back()


def running() -> Communicator | None:
    """The rank that this thread runs; None if it runs none."""
    return _here.get()


@contextmanager
def running_as(communicator: Communicator | None) -> Iterator[None]:
    """Have this thread run what is in the block as a part of this rank."""
    token = _here.set(communicator)
    try:
        yield
    finally:
        _here.reset(token)
