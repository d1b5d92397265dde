"""Driver, worker: which processes of this host can read which others' memory.

Each pair finds out once, in a handshake: one sends the token of a lease, the other tries to read
it. Dask's connections force two of them:

- Two workers. With the first tensors of a message goes an `Offer`: the sender's address and token.
  A receiver that can read the token accepts with a call, and is told where the sender's result
  table lies (`taskgrad.cluster.wire.result_table`).
- A driver and a worker. A driver cannot be called back, so it asks, and sends its own token: can
  the worker read that? The answer has a token of the worker's, for the other direction.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from typing import Any, NamedTuple

from distributed import Client, Worker
from distributed.comm.addressing import get_address_host

from taskgrad.cluster.wire.leases import BufferLease, ValidityToken

logger = logging.getLogger("taskgrad")

ATTEMPTS = 3
"""How often a peer is asked, or trusted, without a single transfer that succeeds."""
ANSWER_S = 2
"""Seconds that a worker may take to be reached and to answer, before its values go by the wire."""
_ACCEPT = "taskgrad_accept"
PROBE = "taskgrad_probe"

_registries: weakref.WeakKeyDictionary[Worker | Client, PeerRegistry] = weakref.WeakKeyDictionary()


class Offer(NamedTuple):
    """To the worker ``to``: tell ``lender`` if you can read the token that comes with this."""

    lender: str
    to: str


class PeerSet(set[str]):
    """Peers to or from which memory can be read, and how often the others have been asked."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: Counter[str] = Counter()

    def ask(self, peer: str) -> bool:
        """True if it is unknown whether this peer belongs here, and it should be asked: counted."""
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
    """What one worker or driver knows of its peers: workers by address, drivers by client id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = PeerSet()
        """Workers that can read this process."""
        self.readable = PeerSet()
        """Workers that this driver can read."""
        self.drivers: set[str] = set()
        """Drivers that read this worker."""
        self.table: Any = None
        """The location of this worker's result table."""
        self.tables: dict[str, Any] = {}
        """The locations of other workers' result tables, by address."""
        self.closed = False

    def may_read(self, peer: str | None) -> bool:
        """True for a driver that reads this worker, and for any worker with an address here."""
        if self.closed or peer is None:
            return False
        same_host = "://" in peer and get_address_host(peer) == get_address_host(self.name)
        return same_host or peer in self.drivers

    def reads(self, peer: str) -> bool:
        """True if this worker or driver has been found able to read this process."""
        return peer in self.readers or peer in self.drivers

    def used(self, peer: str, succeeded: bool) -> None:
        """Record whether a peer read what was leased to it."""
        self.readers.used(peer, succeeded)
        if not succeeded:
            self.drivers.discard(peer)


def registry_of(client: Client) -> PeerRegistry:
    """The registry of a driver."""
    return _registries.setdefault(client, PeerRegistry(client.id))


def registry_at(address: str | None) -> PeerRegistry | None:
    """The registry of the worker in this process that has this address, if it leases memory."""
    return next((known for known in list(_registries.values()) if known.name == address), None)


def register(worker: Worker) -> PeerRegistry:
    """Start a worker's registry, and have it answer both handshakes."""
    registry = _registries[worker] = PeerRegistry(worker.address)
    lease = BufferLease()

    def accept(address: str) -> Any:
        registry.readers.add(address)
        return registry.table

    def probe(client: str, token: Any) -> tuple[bool, tuple[Any, ...]]:
        registry.drivers.add(client)
        return ValidityToken(*token).is_readable(), tuple(lease.token)

    worker.handlers[_ACCEPT] = accept
    worker.handlers[PROBE] = probe
    return registry


def unregister(worker: Worker) -> bool:
    """Undo `register`; returns whether there was anything to undo."""
    registry = _registries.pop(worker, None)
    if registry is None:
        return False
    registry.closed = True
    for name in (_ACCEPT, PROBE):
        worker.handlers.pop(name, None)
    return True


def consider(offer: Offer, token: ValidityToken) -> None:
    """On a worker: accept an offer if this process can read its token."""
    known = list(_registries.items())
    worker: Any = next((owner for owner, peers in known if peers.name == offer.to), None)
    if worker is not None and token.is_readable():
        worker.loop.add_callback(_accept, worker, offer.lender)


async def _accept(worker: Worker, lender: str) -> None:
    try:
        table = await getattr(worker.rpc(lender), _ACCEPT)(address=worker.address)
    except Exception:  # it is gone, or no longer leases memory
        logger.debug("%s cannot accept the offer of %s", worker.address, lender, exc_info=True)
        return
    if table is not None and worker in _registries:
        _registries[worker].tables[lender] = table


async def probe(client: Client, worker: str) -> None:
    """The handshake of driver and worker: find out for both directions who can read whom."""
    registry, lease = registry_of(client), BufferLease()
    try:
        asked = getattr(client.rpc(worker), PROBE)(client=client.id, token=tuple(lease.token))
        reads, token = await asyncio.wait_for(asked, ANSWER_S)
    except Exception:  # it is gone, or leases no memory, at least not yet
        logger.debug("%s does not answer a probe", worker, exc_info=True)
        return
    registry.readers.answered(worker, reads)
    registry.readable.answered(worker, ValidityToken(*token).is_readable())
