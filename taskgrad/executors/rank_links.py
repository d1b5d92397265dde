"""Channels between workers whose ranks run as tasks, or of which each runs several ranks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from distributed import Client

from taskgrad.cluster.session import Session
from taskgrad.executors.connections import Connections
from taskgrad.executors.reachable import Reachable, Workers
from taskgrad.graph.calls import Call
from taskgrad.graph.nodes import new_key

_MOST_LINKS = 4  # that a client keeps between calls


class RankLinks:
    """The links of one client: connections to some workers, which have channels to each other."""

    def __init__(self) -> None:
        self._links: OrderedDict[Workers, Connections] = OrderedDict()  # the last used is last
        self._used: WeakKeyDictionary[Call, Connections] = WeakKeyDictionary()
        self._reachable = Reachable("ranks send messages over Dask's own connections")
        self._lock = threading.Lock()

    def link(self, session: Session, calls: Sequence[Call]) -> None:
        """Link the workers of these calls, ranks of one group, if they can reach each other.

        They stay linked as long as one of the calls is there: its backward may need it. Without a
        link, messages go over Dask's connections.
        """
        rank = calls[0].spec.rank
        assert rank is not None
        workers = tuple(dict.fromkeys(rank.group.workers))
        if len(workers) == 1:
            return
        with self._lock:
            found = self._links.pop(workers, None)
            if found is None or found.error is not None or found.lost:
                found = self._connect(session, workers)
            if found is None:
                return
            self._links[workers] = found
            if len(self._links) > _MOST_LINKS:
                self._links.popitem(last=False)
            self._used.update(dict.fromkeys(calls, found))

    def _connect(self, session: Session, workers: Workers) -> Connections | None:
        addresses = [worker.address for worker in workers]
        name = new_key("links").partition("-")[2]
        about = session.client, name, addresses, session.names
        return self._reachable.connected(
            session, workers, lambda: Connections(*about, kind="links", links=True)
        )


_links: WeakKeyDictionary[Client, RankLinks] = WeakKeyDictionary()
_lock = threading.Lock()


def links_of(session: Session) -> RankLinks:
    """The links of the session's client."""
    with _lock:
        return _links.setdefault(session.client, RankLinks())
