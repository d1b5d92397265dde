"""Results that come from the workers to the driver.

Dask's client has the scheduler fetch them and pass them on. A worker of the driver's own host lends
them to the driver instead, as to other workers (`taskgrad.cluster.wire.message_leases`): it is
asked itself, and its memory is read. The driver asks each such worker once where a seal of it lies,
and looks whether it can read that.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future
from distributed.comm.addressing import get_address_host

from taskgrad.cluster import internals
from taskgrad.cluster.wire.leases import ValidityToken
from taskgrad.cluster.wire.message_leases import LENDS, OFFERS

logger = logging.getLogger("taskgrad")

# How long a worker may take to be reached, and to say where its seal is, in seconds.
_ANSWER = 2

_lenders: weakref.WeakKeyDictionary[Client, dict[str, int]] = weakref.WeakKeyDictionary()
"""How often each worker may still fail to lend; 0 for those that cannot."""


async def values(client: Client, futures: Sequence[Future], workers: Sequence[str]) -> list[Any]:
    """The values of tasks that have run on these workers; "" where that is not known."""
    by_worker: dict[str, list[Any]] = {}
    for future, worker in zip(futures, workers, strict=True):
        if worker and future.status == "finished":
            by_worker.setdefault(worker, []).append(future.key)
    found: dict[Any, Any] = {}
    for some in await asyncio.gather(*(_borrow(client, *asked) for asked in by_worker.items())):
        found |= some
    # What has moved, or failed, or is on another host.
    rest = {f.key: f for f in futures if f.key not in found}
    if rest:
        found |= zip(rest, await client.gather([*rest.values()], asynchronous=True), strict=True)
    return [found[future.key] for future in futures]


async def _borrow(client: Client, worker: str, keys: list[Any]) -> dict[Any, Any]:
    """Those of the results that the worker lends."""
    lenders = _lenders.setdefault(client, {})
    if worker not in lenders:
        lenders[worker] = OFFERS if await _lends(client, worker) else 0
    if not lenders[worker]:
        return {}
    try:
        found = await internals.results_of(client, worker, keys, seconds=_ANSWER)
    except Exception:  # it is gone, or what it sent cannot be read; Dask says what there is to say
        logger.debug("%s did not lend %d results", worker, len(keys), exc_info=True)
        lenders[worker] -= 1
        return {}
    lenders[worker] = OFFERS
    return found


async def _lends(client: Client, worker: str) -> bool:
    """Whether it lends, and this process can read it."""
    if worker.startswith("inproc:") or get_address_host(worker) != internals.host_of(client):
        return False
    try:
        asked = getattr(client.rpc(worker), LENDS)(client=client.id)
        return ValidityToken(*await asyncio.wait_for(asked, _ANSWER)).is_valid()
    except Exception:  # it is gone, or lends nothing, or may not be read
        logger.debug("%s lends nothing to the driver", worker, exc_info=True)
        return False
