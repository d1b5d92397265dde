"""Driver, worker: which processes of this host can read which others' memory.

One handshake finds that out for a pair, once. A process that wants to lease sends the token of a
lease to a worker, which tries to read it. Between two workers the one that is asked for a result
does so in the background, and also sends the address of its result table. A driver, which cannot be
called back, starts it for both directions: the answer has a token of the worker's.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from typing import Any

from distributed import Client, Worker
from distributed.comm.addressing import get_address_host

from taskgrad.cluster.closing import stop_answering
from taskgrad.cluster.wire.leases import BufferLease, ValidityToken

logger = logging.getLogger("taskgrad")

ATTEMPTS = 3
"""How often a peer is asked, or trusted, without a single transfer that succeeds."""
ANSWER_S = 2
"""Seconds that a worker may take to answer a driver, before values go by the wire."""
PROBE = "taskgrad_probe"

_registries: weakref.WeakKeyDictionary[Worker | Client, PeerRegistry] = weakref.WeakKeyDictionary()


class PeerSet(set[str]):
    """Peers to or from which memory can be read, and how often the others have been asked."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: Counter[str] = Counter()

    def ask(self, peer: str) -> bool:
        """True if it is open whether this peer belongs here, and it shall be asked: counted."""
        if peer in self or self.attempts[peer] >= ATTEMPTS:
            return False
        self.attempts[peer] += 1
        return True

    def answered(self, peer: str, able: bool) -> None:
        """Record what a probe found."""
        if able:
            self.add(peer)
        else:
            self.attempts[peer] = ATTEMPTS

    def used(self, peer: str, succeeded: bool) -> None:
        """Record a transfer that relied on this peer; after a failure it has to be asked again."""
        if succeeded:
            self.attempts.pop(peer, None)
        else:
            self.discard(peer)


class PeerRegistry:
    """What a worker or driver knows of its peers: workers by address, drivers by client id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = PeerSet()  # that can read this process
        self.readable = PeerSet()  # workers that this process can read
        self.table: Any = None  # the location of this worker's result table
        self.tables: dict[str, Any] = {}  # of other workers' tables, by address
        self.closed = False

    def is_due(self, peer: str | None) -> bool:
        """True if this worker may be on this host, and is to be probed: counted."""
        if self.closed or peer is None or "://" not in peer or peer.startswith("inproc:"):
            return False
        same_host = get_address_host(peer) == get_address_host(self.name)
        return same_host and self.readers.ask(peer)


def registry_of(client: Client) -> PeerRegistry:
    """The registry of a driver."""
    return _registries.setdefault(client, PeerRegistry(client.id))


def registry_at(address: str | None) -> PeerRegistry | None:
    """The registry of the worker in this process that has this address, if it leases memory."""
    return next((known for known in list(_registries.values()) if known.name == address), None)


def register(worker: Worker) -> PeerRegistry:
    """Start a worker's registry, and have it answer probes."""
    registry, lease = PeerRegistry(worker.address), BufferLease()

    def answer(peer: str, token: Any, table: Any) -> tuple[bool, tuple[Any, ...]]:
        able = ValidityToken(*token).is_readable()
        if "://" not in peer:  # a driver, which reads this worker if it asks for results
            registry.readers.add(peer)
        elif able and table is not None:
            registry.tables[peer] = table
        return able, tuple(lease.token)

    worker.handlers[PROBE] = answer
    _registries[worker] = registry
    return registry


def unregister(worker: Worker) -> bool:
    """Undo `register`; returns whether there was anything to undo."""
    registry = _registries.pop(worker, None)
    if registry is not None:
        registry.closed = True
        registry.readers.clear()
        stop_answering(worker, PROBE)
    return registry is not None


async def probe(owner: Client | Worker, worker: str, seconds: float | None = None) -> None:
    """Find out whether a worker can read the owner of a registry, and the owner the worker."""
    lease = BufferLease()
    try:
        registry = _registries[owner]
        ask = getattr(owner.rpc(worker), PROBE)
        asked = ask(peer=registry.name, token=tuple(lease.token), table=registry.table)
        able, token = await asyncio.wait_for(asked, seconds)
    except Exception:  # it is gone, or leases no memory, at least not yet
        logger.debug("%s does not answer a probe", worker, exc_info=True)
        return
    registry.readers.answered(worker, able)
    registry.readable.answered(worker, ValidityToken(*token).is_readable())


async def belongs(known: PeerSet, client: Client, worker: str) -> bool:
    """True if a worker belongs to this set of a driver's registry, after a probe if one is due."""
    if known.ask(worker):
        await probe(client, worker, ANSWER_S)
    return worker in known
