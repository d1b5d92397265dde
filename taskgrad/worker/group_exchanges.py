"""One task's part in the exchanges of its process group: what a rank sends, and waits for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

from taskgrad.errors import CollectiveError, TaskgradError, WorkerLostError
from taskgrad.graph.calls import Rank
from taskgrad.worker.deadlock import Cycle, DeadlockWatch
from taskgrad.worker.mailbox import (
    ExchangeId,
    GroupAborted,
    Mailboxes,
    Message,
    TaskOutcome,
    Transport,
    Waiting,
    inner_key,
)
from taskgrad.worker.payloads import copied
from taskgrad.worker.randomness import drawing_from, streams_here
from taskgrad.worker.rank_channels import RankChannels, channels_here
from taskgrad.worker.settings import settings_released

# How long a rank that waits keeps its thread and its random stream, if no other is on its worker.
_KEEP_THREAD_S = 0.005
# How long it then waits before it asks whether the other ranks still run.
_POLL_S = 0.25
# How long it then waits before it asks whom they wait for; later it asks less often.
_LOOK_S, _MOST_LOOK_S = 1.0, 10.0
# How often a rank that waits for channels looks at its mailbox, if nothing wakes it.
_CHECK_S = 0.5


class GroupExchanges:
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
            given = [(self._others[i][1], messages[i]) for i in peers]
            sent = self._transport.send(worker, given, self._group.client)
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
        self._mailboxes.waits(self._key, Waiting(what, self.number, exchange, tuple(sources)))
        try:
            with settings_released():
                if self._come(exchange, sources, large, _POLL_S):
                    return
                missing = self._mailboxes.wait(self._key, exchange, sources, 0)
                asked = [self._attend(i, what, exchange) for i in missing]
                try:
                    if self._come_unless_deadlocked(
                        exchange, sources, large, start + self._group.deadline
                    ):
                        return
                finally:
                    for stop in asked:
                        stop()
                missing = self._mailboxes.wait(self._key, exchange, sources, 0)
        finally:
            self._mailboxes.waits(self._key, None)
        raise GroupAborted(CollectiveError(self._late(missing, what)))

    def _come_unless_deadlocked(
        self,
        exchange: ExchangeId,
        sources: list[int],
        large: Sequence[Callable[[], bool]],
        end: float,
    ) -> bool:
        """As `_come`, until `end`; raises GroupAborted if the ranks wait for each other."""
        watch, pause = DeadlockWatch(self._rank.index, self._ask), _LOOK_S
        while True:
            left = end - time.monotonic()
            if self._come(exchange, sources, large, min(pause, left)):
                return True
            if left <= pause:
                return False
            cycle = watch.look()
            if cycle is not None:
                raise GroupAborted(CollectiveError(self._deadlocked(cycle)))
            pause = min(_MOST_LOOK_S, 1.5 * pause)

    def _ask(self, rank: int, exchange: ExchangeId) -> Waiting | None:
        """In what a rank waits; None too if its worker does not say so soon."""
        worker, key = self._others.get(rank, ("", self._key))
        if rank in self._neighbours or not worker:
            return self._mailboxes.waiting(key, exchange)
        try:
            return self._transport.waiting(worker, key, exchange).result(_LOOK_S)
        except (OSError, FutureTimeoutError):
            return None

    def has_begun(self, exchange: ExchangeId) -> bool:
        """True if this rank has sent its messages of an exchange, or does."""
        return self._numbers[exchange.ranks] > exchange.number

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

    def _deadlocked(self, cycle: Cycle) -> str:
        after = [*cycle[1:], cycle[0]]
        calls = "; ".join(
            f"rank {rank} on worker {self._group.workers[rank]} calls {waits.what} as its "
            f"collective number {waits.number}, and waits for rank {following}"
            for (rank, waits), (following, _) in zip(cycle, after, strict=True)
        )
        return (
            f"ranks of {self._group.title} wait for each other: {calls}. All ranks call the same "
            "collectives in the same order, those on different axes too"
        )

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
