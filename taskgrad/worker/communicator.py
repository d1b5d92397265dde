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

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from taskgrad.errors import CollectiveError, TaskgradError, WorkerLostError
from taskgrad.graph.calls import Rank
from taskgrad.worker.forward_mode import shared_level
from taskgrad.worker.mailbox import (
    ExchangeId,
    GroupAborted,
    Mailboxes,
    Message,
    TaskOutcome,
    Transport,
    inner_key,
)
from taskgrad.worker.payloads import copied
from taskgrad.worker.randomness import drawing_from, streams_here
from taskgrad.worker.rank_channels import RankChannels, channels_here, having
from taskgrad.worker.settings import settings_released

# How long a rank that waits keeps its thread and its random stream, if no other is on its worker.
_KEEP_THREAD_S = 0.005
# How long it then waits before it asks whether the other ranks still run.
_POLL_S = 0.25
# How often a rank that waits for channels looks at its mailbox, if nothing wakes it.
_CHECK_S = 0.5

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
        self._active: _Exchange | None = None

    @contextmanager
    def active(self, key: str, peers: Sequence[str]) -> Iterator[None]:
        """Run the task `key` of this rank in the block; `peers` are the tasks of all ranks.

        If the block raises, the other ranks raise the same error.
        """
        exchange = _Exchange(self.rank, self.mailboxes, key, peers)
        token = _here.set(self)
        self._active = exchange
        self.mailboxes.open(key, exchange.lost, exchange.wake)
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

    def _running(self, what: str) -> _Exchange:
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


class _Exchange:
    """One task's part in the exchanges of its process group."""

    def __init__(self, rank: Rank, mailboxes: Mailboxes, key: str, peers: Sequence[str]) -> None:
        self.number = 0  # of exchanges so far
        self._numbers: Counter[tuple[int, ...]] = Counter()
        self._rank = rank
        self._group = rank.group
        self._mailboxes = mailboxes
        self._key = key
        self._peers = tuple(peers)
        self._maps = 0  # inside, so far
        self._others = {
            i: (worker.address, peer)
            for i, (worker, peer) in enumerate(zip(rank.group.workers, peers, strict=True))
            if i != rank.index
        }
        here = rank.group.workers[rank.index].address
        self._neighbours = {i for i, (worker, _) in self._others.items() if worker == here}
        self._thread: int | None = threading.get_ident()
        self._streams = streams_here()
        self._under_way: list[tuple[str, Future[Any]]] = []
        self._channels = channels_here()
        self._in = "its function"

    @property
    def _transport(self) -> Transport:
        if self._mailboxes.transport is None:
            raise TaskgradError("this worker has no taskgrad plugin: is it closing?")
        return self._mailboxes.transport

    def exchange(
        self, what: str, wants: bool, payloads: Sequence[list[Any]], members: tuple[int, ...]
    ) -> list[Message]:
        ranks = tuple(sorted(members))
        exchange = ExchangeId(ranks, self._numbers[ranks])
        self._numbers[ranks] += 1
        self.number += 1
        self._in = what
        given = dict(zip(members, payloads, strict=True))
        own = given.pop(self._rank.index)
        message = partial(Message, self._rank.index, exchange, what, wants, self._mailboxes.store)
        large = self._send(message, what, given)
        sources = list(given)
        with drawing_from(self._streams):  # of a device, backwards run in a thread of torch's
            self._wait(exchange, what, sources, large)
        found = dict(zip(sources, self._mailboxes.take(self._key, exchange, sources), strict=True))
        found[self._rank.index] = message(own)
        messages = [found[i] for i in members]
        if any(m.what != what for m in messages):
            calls = "; ".join(f"rank {m.source} calls {m.what}" for m in messages)
            raise GroupAborted(
                CollectiveError(
                    f"the ranks of {self._group.title} call different collectives, as their number "
                    f"{self.number}: {calls}. All ranks call the same ones, in the same order, "
                    "with the same shapes"
                )
            )
        return messages

    def inner_keys(self, size: int) -> list[str]:
        number = self._maps
        self._maps += 1
        return [inner_key(peer, number, index) for peer in self._peers for index in range(size)]

    def _send(
        self, message: Callable[[list[Any]], Message], what: str, payloads: dict[int, list[Any]]
    ) -> list[Callable[[], bool]]:
        """Send other ranks their payloads.

        Returns functions that say whether the memory of large ones is no longer read.
        """
        large: list[Callable[[], bool]] = []
        self._under_way = [(w, f) for w, f in self._under_way if not f.done()]
        own, borrowed = copied(payloads, self._neighbours)
        messages = {i: message(payload) for i, payload in own.items()}
        if self._channels is not None:
            sent_by = [(i, self._channels.send(i, m)) for i, m in messages.items()]
            return [done for i, done in sent_by if i in borrowed]
        posts: dict[str, list[int]] = {}  # the ranks on each worker
        for i in messages:
            posts.setdefault(self._others[i][0], []).append(i)
        for worker, peers in posts.items():
            sent = self._transport.send(worker, [(self._others[i][1], messages[i]) for i in peers])
            self._under_way.append((worker, sent))
            sent.add_done_callback(self._answered(peers, what))
            if borrowed.intersection(peers):
                large.append(sent.done)
                sent.add_done_callback(self._mailboxes.wake)
        return large

    def _wait(
        self,
        exchange: ExchangeId,
        what: str,
        sources: list[int],
        large: Sequence[Callable[[], bool]],
    ) -> None:
        start = time.monotonic()
        if self._come(exchange, sources, large, 0.0 if self._neighbours else _KEEP_THREAD_S):
            return
        self.give_thread_back()
        with settings_released():
            if self._come(exchange, sources, large, _POLL_S):
                return
            missing = self._mailboxes.wait(self._key, exchange, sources, 0)
            asked = [self._attend(i, what, exchange) for i in missing]
            try:
                left = start + self._group.deadline - time.monotonic()
                if self._come(exchange, sources, large, left):
                    return
            finally:
                for stop in asked:
                    stop()
            missing = self._mailboxes.wait(self._key, exchange, sources, 0)
        raise GroupAborted(CollectiveError(self._late(missing, what)))

    def _come(
        self,
        exchange: ExchangeId,
        sources: list[int],
        large: Sequence[Callable[[], bool]],
        seconds: float,
    ) -> bool:
        end = time.monotonic() + max(0.0, seconds)
        if self._channels is not None:
            return self._come_by_channel(self._channels, exchange, sources, large, end)
        if self._mailboxes.wait(self._key, exchange, sources, end - time.monotonic()):
            return False
        done = self._mailboxes.until(
            lambda: self._mailboxes.error(self._key) is not None or all(done() for done in large),
            max(0.0, end - time.monotonic()),
        )
        self._mailboxes.wait(self._key, exchange, sources, 0)  # raises what there is to raise
        return done

    def _come_by_channel(
        self,
        channels: RankChannels,
        exchange: ExchangeId,
        sources: list[int],
        large: Sequence[Callable[[], bool]],
        end: float,
    ) -> bool:
        while self._mailboxes.wait(self._key, exchange, sources, 0) or not all(d() for d in large):
            left = end - time.monotonic()
            if left <= 0:
                return False
            for message in channels.receive(min(left, _CHECK_S)):
                self._mailboxes.deliver(self._key, message)
        return True

    def wake(self) -> None:
        """There is news in this task's mailbox."""
        if self._channels is not None:
            self._channels.wake()

    def _late(self, missing: set[int], what: str) -> str:
        names = ", ".join(f"rank {i} on worker {self._group.workers[i]}" for i in sorted(missing))
        seconds = f"{self._group.deadline:g} s"
        why = (
            f"has waited {seconds} for {names}: not come to a collective of that number. Do all "
            "ranks call the same ones?"
            if missing
            else f"has waited {seconds} until what it sent had arrived"
        )
        return (
            f"{self._rank} on worker {self._mailboxes.worker}, in {what}, its collective number "
            f"{self.number}, {why} Else raise Dask's setting taskgrad.collective-deadline"
        )

    def _answered(self, peers: list[int], what: str) -> Callable[[Future[Any]], None]:
        def done(sent: Future[Any]) -> None:
            if sent.cancelled():
                return
            if sent.exception() is not None:
                self._mailboxes.fail(self._key, self._gone(peers[0]))
                return
            for peer, end in zip(peers, sent.result(), strict=True):
                if end is not None:
                    self._mailboxes.fail(self._key, self._over(peer, end, what))

        return done

    def _attend(self, peer: int, what: str, exchange: ExchangeId) -> Callable[[], None]:
        """Ask for a rank's outcome until it has come, or never will; returns what stops that."""
        worker, key = self._others[peer]
        stopped = threading.Event()
        asked: list[Future[Any]] = []
        # What a rank on another worker has sent may come after the answer, which has a way of its
        # own.
        grace = 0.0 if peer in self._neighbours else _POLL_S

        def over(end: TaskOutcome) -> None:
            if not stopped.is_set() and self._absent(peer, exchange):
                self._mailboxes.fail(self._key, self._over(peer, end, what))

        def ask() -> None:
            future = self._transport.attend(worker, key)
            asked[:] = [future]
            future.add_done_callback(done)

        def done(future: Future[Any]) -> None:
            if stopped.is_set() or future.cancelled():
                return
            if future.exception() is not None:
                self._mailboxes.fail(self._key, self._gone(peer))
            elif future.result() is None:
                ask()
            elif grace:
                timer = threading.Timer(grace, over, [future.result()])
                timer.daemon = True
                timer.start()
            else:
                over(future.result())

        def stop() -> None:
            stopped.set()
            asked[0].cancel()

        ask()
        return stop

    def _absent(self, peer: int, exchange: ExchangeId) -> bool:
        """True if no message of this rank has come; its messages arrive before its outcome."""
        try:
            return bool(self._mailboxes.wait(self._key, exchange, [peer], 0))
        except GroupAborted:
            return False

    def lost(self, worker: str) -> BaseException | None:
        """The error with which this rank fails when a worker is gone; None if it does not."""
        peers = [i for i, (address, _) in self._others.items() if address == worker]
        return self._gone(peers[0]) if peers else None

    def _gone(self, peer: int) -> BaseException:
        return WorkerLostError(
            f"rank {peer} of {self._group.title} is gone with worker {self._group.workers[peer]}, "
            f"while rank {self._rank.index} was in {self._in}. Look at that worker's log "
            "(memory?), then call again"
        )

    def _over(self, peer: int, end: TaskOutcome, what: str) -> BaseException:
        if end.error is not None:
            return end.error
        return CollectiveError(
            f"the ranks of {self._group.title} call different numbers of collectives: rank "
            f"{self._rank.index} calls {what} as its number {self.number}; rank {peer} on worker "
            f"{self._group.workers[peer]} has ended after {end.count}. All ranks call the same "
            "ones, in the same order"
        )

    def give_thread_back(self) -> None:
        if self._thread == threading.get_ident():
            self._thread = None
            self._transport.give_thread_back()

    def tell_all(self, error: BaseException) -> None:
        """Make all other ranks fail with this error."""
        for worker, key in self._others.values():
            self._under_way.append((worker, self._transport.tell(worker, key, error)))

    def flush(self) -> None:
        """Wait until what was sent has arrived or cannot: only then may others learn of the end."""
        end = time.monotonic() + self._group.deadline
        for _, sent in self._under_way:
            sent.add_done_callback(self._mailboxes.wake)
        self._mailboxes.until(
            lambda: all(
                f.done() or self._mailboxes.is_gone(self._key, w) for w, f in self._under_way
            ),
            end - time.monotonic(),
        )
