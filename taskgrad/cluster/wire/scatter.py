"""Inputs that go from the driver straight to the workers that take them.

To workers on the driver's own host they are lent, as results are between two workers
(`taskgrad.cluster.wire.message_leases`), to each by itself. Other workers pass on what several
take.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client, Future
from distributed.protocol.serialize import to_serialize

from taskgrad.cluster import client_calls
from taskgrad.cluster.wire.message_leases import OFFERS, READS, Lender, Loan, lend
from taskgrad.graph.copies import own_copy

logger = logging.getLogger("taskgrad")

# How long an input waits for its worker to be there and running, or to answer, in seconds.
_RUNNING = 2

Part = tuple[dict[str, Any], list[str]]
"""Values by their keys, and the workers that take them."""

_lenders: weakref.WeakKeyDictionary[Client, Lender] = weakref.WeakKeyDictionary()


class _Whole:
    """Is pickled as the value in it; Dask would pickle each element of a list by itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> Any:
        return _itself, (self._value,)


def _itself(value: Any) -> Any:
    return value


def send(client: Client, parts: Sequence[Part]) -> dict[str, Future]:
    """Put values on workers, by their keys, all at once.

    Nothing is sent where they take nothing, as they are gone or paused: the values then travel in
    the graph, and whoever waits for the call says what is wrong with its worker.
    """

    async def send_all() -> dict[str, Future]:
        workers = list(dict.fromkeys(worker for _, takers in parts for worker in takers))
        loans = await asyncio.gather(*(_loan(client, worker) for worker in workers))
        lent = {w: loan for w, loan in zip(workers, loans, strict=True) if loan is not None}
        found = await _lend(client, [part for part in parts if lent.keys() >= {*part[1]}], lent)
        rest = [part for part in parts if not found.keys() >= part[0].keys()]
        for sent in await asyncio.gather(*(_send(client, *part) for part in rest)):
            found |= sent
        return found

    return client_calls.answer(client, send_all, "to take an input")


async def _lend(
    client: Client, parts: Sequence[Part], loans: Mapping[str, Loan]
) -> dict[str, Future]:
    """What all its takers have read here. One message to each of them, and two to the scheduler."""
    if not parts:
        return {}
    scheduler: Any = client.scheduler
    running = await scheduler.ncores_running(workers=list(loans))
    by_worker: dict[str, dict[str, Any]] = {}
    for values, takers in parts:
        if running.keys() >= {*takers}:
            for worker in takers:
                by_worker.setdefault(worker, {}).update(values)
    sizes = await asyncio.gather(*(_give(client, loans[w], w, v) for w, v in by_worker.items()))
    took = {worker: size for worker, size in zip(by_worker, sizes, strict=True) if size is not None}
    done = [part for part in parts if took.keys() >= {*part[1]}]
    if not done:
        return {}
    try:
        await scheduler.update_data(
            who_has={key: takers for values, takers in done for key in values},
            nbytes={key: size for sizes in took.values() for key, size in sizes.items()},
            client=client.id,
        )
    except KeyError:  # a worker has gone
        return {}
    memory: Any = "memory"  # whatever Dask's annotations say, the name of a state
    return {key: Future(key, client, memory) for values, _ in done for key in values}


async def _give(
    client: Client, loan: Loan, worker: str, values: dict[str, Any]
) -> dict[str, int] | None:
    """The bytes that each value has on the worker, or None if it did not get them."""
    try:
        with lend(loan):
            wrapped = {key: to_serialize(_Whole(value)) for key, value in values.items()}
            answer = await client.rpc(worker).update_data(data=wrapped)
            sizes: dict[str, int] = answer["nbytes"]
            return sizes
    except OSError:
        logger.debug("%s did not read an input", worker, exc_info=True)
        return None


async def _send(client: Client, values: dict[str, Any], workers: list[str]) -> dict[str, Future]:
    if any(worker.startswith("inproc:") for worker in workers):  # there, nothing is pickled
        values = {key: own_copy(value) for key, value in values.items()}
    else:
        values = {key: _Whole(value) for key, value in values.items()}
    for direct in (True, False):  # where the client cannot reach them, by way of the scheduler
        try:
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


async def _loan(client: Client, worker: str) -> Loan | None:
    """One to this worker, if it can read this process and is another one."""
    if worker.startswith("inproc:"):
        return None
    lender = _lenders.setdefault(client, Lender(client.id))
    if worker not in lender.readers and lender.offers[worker] < OFFERS:
        lender.offers[worker] += 1
        loan = Loan(lender, worker)
        with lend(loan):
            asked = getattr(client.rpc(worker), READS)(seal=tuple(loan.token))
            try:
                if await asyncio.wait_for(asked, _RUNNING):
                    lender.readers.add(worker)
                else:
                    lender.offers[worker] = OFFERS
            except Exception:  # it is gone, or does not borrow, at least not yet
                logger.debug("%s cannot read the driver's memory", worker, exc_info=True)
    return Loan(lender, worker) if worker in lender.readers else None
