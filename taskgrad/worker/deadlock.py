"""Find ranks that wait for each other, each in another collective, before a deadline ends them.

As in Chandy, Misra and Haas (Distributed Deadlock Detection, 1983) a rank that waits follows who
waits for whom. Here it asks, and keeps nothing on the others.
"""

from __future__ import annotations

from collections.abc import Callable

from taskgrad.worker.mailbox import ExchangeId, Waiting

Cycle = list[tuple[int, Waiting]]
"""Ranks, each of which waits for the next one, and the last one for the first."""


class DeadlockWatch:
    """What a rank that waits has found out about those that it waits for.

    ``ask(rank, exchange)`` says in what a rank waits; None if it does not, or has begun this
    exchange, so that its message will come.
    """

    def __init__(self, rank: int, ask: Callable[[int, ExchangeId], Waiting | None]) -> None:
        self._rank = rank
        self._ask = ask
        self._last: list[tuple[int, ExchangeId]] | None = None

    def look(self) -> Cycle | None:
        """The ranks that wait for each other, this one among them, if they did at the last look.

        The answers of one look are of different times. Ranks that were in the same exchanges at
        two looks have waited in them all the time between.
        """
        found = self._cycle()
        now = None if found is None else [(rank, waits.exchange) for rank, waits in found]
        same, self._last = now is not None and now == self._last, now
        return found if same else None

    def _cycle(self) -> Cycle | None:
        own = self._ask(self._rank, ExchangeId((), 0))
        if own is None:
            return None
        followed = {self._rank}
        paths: list[Cycle] = [[(self._rank, own)]]
        while paths:
            path = paths.pop()
            waits = path[-1][1]
            for rank in waits.missing:
                if rank in followed and rank != self._rank:
                    continue
                found = self._ask(rank, waits.exchange)
                if found is None:
                    continue
                if rank == self._rank:
                    return path
                followed.add(rank)
                paths.append([*path, (rank, found)])
        return None
