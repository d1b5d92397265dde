"""Driver: send inputs straight to the workers that take them.

Workers on the driver's host read them in its memory, each by itself
(`taskgrad.cluster.wire.message_leases`). To the others one copy is sent, which they pass on among
themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future
from distributed.protocol.serialize import to_serialize

from taskgrad.cluster import client_calls
from taskgrad.cluster.wire import peers
from taskgrad.cluster.wire.message_leases import MessageLease, PickledCall
from taskgrad.graph.copies import own_copy

logger = logging.getLogger("taskgrad")

Part = tuple[dict[str, Any], list[str]]
"""Values by their keys, and the workers that take them."""


def _identity(value: Any) -> Any:
    return value


def _whole(value: Any) -> PickledCall:
    """To pickle a value as one; of a list Dask would pickle each element by itself."""
    return PickledCall(_identity, value)


def send(client: Client, parts: Sequence[Part]) -> dict[str, Future]:
    """Put values on workers, by their keys, all at once.

    Values whose workers are gone or paused are missing from what this returns. They go with the
    graph instead, and the wait for their calls reports what is wrong with the worker.
    """

    async def send_all() -> dict[str, Future]:
        workers = list(dict.fromkeys(worker for _, takers in parts for worker in takers))
        readers = {*await asyncio.gather(*(_reader(client, worker) for worker in workers))}
        found = await _lease(client, [part for part in parts if readers >= {*part[1]}])
        rest = [part for part in parts if not found.keys() >= part[0].keys()]
        for sent in await asyncio.gather(*(_send(client, *part) for part in rest)):
            found |= sent
        return found

    return client_calls.call_with_deadline(client, send_all, "to take an input")


async def _reader(client: Client, worker: str) -> str | None:
    """The worker's address if it can read this driver's memory."""
    if worker.startswith("inproc:"):
        return None
    readers = peers.registry_of(client).readers
    return worker if await peers.belongs(readers, client, worker) else None


async def _lease(client: Client, parts: Sequence[Part]) -> dict[str, Future]:
    """What all its takers have read here. One message to each of them, and two to the scheduler."""
    if not parts:
        return {}
    scheduler: Any = client.scheduler
    running = await scheduler.ncores_running(workers=[w for _, takers in parts for w in takers])
    by_worker: dict[str, dict[str, Any]] = {}
    for values, takers in parts:
        if running.keys() >= {*takers}:
            for worker in takers:
                by_worker.setdefault(worker, {}).update(values)
    sizes = await asyncio.gather(*(_lease_to(client, *item) for item in by_worker.items()))
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


async def _lease_to(client: Client, worker: str, values: dict[str, Any]) -> dict[str, int] | None:
    """The bytes that each value has on the worker, or None if it did not get them."""
    lease = MessageLease(peers.registry_of(client).readers, worker)
    try:
        with lease.attached():
            wrapped = {key: to_serialize(_whole(value)) for key, value in values.items()}
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
        values = {key: _whole(value) for key, value in values.items()}
    for direct in (True, False):  # where the client cannot reach them, by way of the scheduler
        try:
            sent: Any = client.scatter(
                values,
                workers=workers,
                broadcast=len(workers) > 1,
                direct=direct,
                hash=False,
                timeout=peers.ANSWER_S,
            )
            found: dict[str, Future] = await sent
            return found
        except TimeoutError:  # none of them is there and running
            return {}
        except (OSError, KeyError):
            continue
    return {}
