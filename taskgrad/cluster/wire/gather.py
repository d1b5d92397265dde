"""Driver: fetch results from workers.

Dask's client has the scheduler fetch them and pass them on. A worker on the driver's host is asked
directly instead, and leases them to the driver as it does to other workers
(`taskgrad.cluster.wire.message_leases`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future
from distributed.comm.addressing import get_address_host

from taskgrad.cluster import internals
from taskgrad.cluster.client_calls import LoopFuture
from taskgrad.cluster.wire import peers

logger = logging.getLogger("taskgrad")


def gather_values(client: Client, futures: Sequence[Future], workers: Sequence[str]) -> LoopFuture:
    """The values, on their way, of tasks that have run on these workers; "" where unknown."""
    return LoopFuture(client, lambda: _values(client, futures, workers))


async def _values(client: Client, futures: Sequence[Future], workers: Sequence[str]) -> list[Any]:
    by_worker: dict[str, list[Any]] = {}
    for future, worker in zip(futures, workers, strict=True):
        if worker and future.status == "finished":
            by_worker.setdefault(worker, []).append(future.key)
    found: dict[Any, Any] = {}
    for some in await asyncio.gather(*(_read(client, *asked) for asked in by_worker.items())):
        found |= some
    # What has moved, or failed, or is on another host.
    rest = {f.key: f for f in futures if f.key not in found}
    if rest:
        found |= zip(rest, await client.gather([*rest.values()], asynchronous=True), strict=True)
    return [found[future.key] for future in futures]


async def _read(client: Client, worker: str, keys: list[Any]) -> dict[Any, Any]:
    """Those of the results that the worker leases to this driver."""
    if worker.startswith("inproc:") or get_address_host(worker) != internals.host_of(client):
        return {}
    readable = peers.registry_of(client).readable
    if not await peers.belongs(readable, client, worker):
        return {}
    try:
        found = await internals.results_of(client, worker, keys, seconds=peers.ANSWER_S)
    except Exception:  # it is gone, or what it sent cannot be read; Dask says what there is to say
        logger.debug("%s did not lease %d results", worker, len(keys), exc_info=True)
        readable.used(worker, False)
        return {}
    readable.used(worker, True)
    return found
