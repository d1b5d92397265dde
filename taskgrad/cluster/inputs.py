"""Inputs that go from the driver straight to the workers that take them.

To a worker on the driver's own host they are lent, as results are between two workers
(`taskgrad.cluster.loans`). A driver has no address at which a worker could tell it that it can read
its memory; so the driver asks each worker once, before the first input that goes there.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future

from taskgrad.cluster import waiting
from taskgrad.cluster.loans import OFFERS, READS, Lender, Loan, lend

logger = logging.getLogger("taskgrad")

# How long an input waits for its worker to be there and running, or to answer, in seconds.
_RUNNING = 2

_lenders: weakref.WeakKeyDictionary[Client, Lender] = weakref.WeakKeyDictionary()


class _Whole:
    """Is pickled as the value in it; Dask would pickle each element of a list by itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> Any:
        return _itself, (self._value,)


def _itself(value: Any) -> Any:
    return value


def send(client: Client, parts: Sequence[tuple[dict[str, Any], list[str]]]) -> dict[str, Future]:
    """Put values on workers, by their keys, all at once.

    Nothing is sent where they take nothing, as they are gone or paused: the values then travel in
    the graph, and whoever waits for the call says what is wrong with its worker.
    """

    async def send_all() -> dict[str, Future]:
        found: dict[str, Future] = {}
        for sent in await asyncio.gather(*(_send(client, *part) for part in parts)):
            found |= sent
        return found

    return waiting.answer(client, send_all, "to take an input")


async def _send(client: Client, values: dict[str, Any], workers: list[str]) -> dict[str, Future]:
    if all(not worker.startswith("inproc:") for worker in workers):  # there, nothing is pickled
        values = {key: _Whole(value) for key, value in values.items()}
    loan = await _loan(client, workers)
    ways = [(True, loan)] if loan is not None else []
    # Directly where the client can reach them, else by way of the scheduler.
    for direct, lent in (*ways, (True, None), (False, None)):
        try:
            with lend(lent):
                sent: Any = client.scatter(
                    values,
                    workers=workers,
                    broadcast=len(workers) > 1,
                    direct=direct,
                    hash=False,
                    timeout=_RUNNING,
                )
                found: dict[str, Future] = await sent
                return found
        except TimeoutError:  # none of them is there and running
            return {}
        except (OSError, KeyError):
            continue
    return {}


async def _loan(client: Client, workers: Sequence[str]) -> Loan | None:
    """One to this worker, if it can read this process. Several pass on what they get."""
    if len(workers) != 1:
        return None
    (worker,) = workers
    lender = _lenders.setdefault(client, Lender(client.id))
    if worker not in lender.readers and lender.offers[worker] < OFFERS:
        lender.offers[worker] += 1
        loan = Loan(lender, worker)
        with lend(loan):
            asked = getattr(client.rpc(worker), READS)(seal=tuple(loan.seal))
            try:
                if await asyncio.wait_for(asked, _RUNNING):
                    lender.readers.add(worker)
                else:
                    lender.offers[worker] = OFFERS
            except Exception:  # it is gone, or does not borrow, at least not yet
                logger.debug("%s cannot read the driver's memory", worker, exc_info=True)
    return Loan(lender, worker) if worker in lender.readers else None
