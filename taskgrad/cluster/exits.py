"""Driver: close clients when Python exits, while threads and connections can still be started.

Dask's own exit handlers run later, and close clusters before their clients, as if all workers had
been lost. A program that does not close its client would end with errors in its log. Local clusters
are closed here, too, as Dask would when it can no longer start threads. What Dask logs from then on
is about that end alone, and is not printed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from distributed import Client

# Prefixes of the names of idle threads that belong to Dask's event loop.
_LOOP_THREADS = ("asyncio_", "Dask-Offload")

_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_clusters: weakref.WeakSet[Any] = weakref.WeakSet()
_before_clients: dict[Callable[[], Any], int] = {}
"""Functions to call before clients are closed, with the ids of the processes that added them."""


def close_at_exit(client: Client) -> None:
    """Close a client, and a local cluster that it is of, when the program ends."""
    _register()
    _clients.add(client)
    if getattr(client.cluster, "shutdown_on_close", False):
        _clusters.add(client.cluster)


def at_exit(close: Callable[[], Any]) -> None:
    """Call this when the program ends, before clients are closed; not in a forked child."""
    _register()
    _before_clients[close] = os.getpid()


def not_at_exit(close: Callable[[], Any]) -> None:
    """Undo `at_exit`."""
    _before_clients.pop(close, None)


@functools.cache
def _register() -> None:
    early = getattr(threading, "_register_atexit", None)
    if early is not None:
        with contextlib.suppress(RuntimeError):  # the program is ending already
            early(_early, os.getpid())
    atexit.register(_close_all, os.getpid())


def _early(process: int) -> None:
    """Close all after the main thread's end, unless other threads may still use the clients."""
    here = (threading.main_thread(), threading.current_thread())
    others = [t for t in threading.enumerate() if not t.daemon and t not in here]
    if all(t.name.startswith(_LOOP_THREADS) for t in others):
        _close_all(process)


def _close_all(process: int) -> None:
    """Close what this process, not one it was forked from, has opened."""
    if process == os.getpid() and (_clients or _clusters):
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    for close, its in list(_before_clients.items()):
        not_at_exit(close)
        if its == os.getpid():
            close()
    if process == os.getpid():
        for client in list(_clients):
            with contextlib.suppress(Exception):  # Python ends, whatever the cluster does
                client.close()
        for cluster in list(_clusters):
            with contextlib.suppress(Exception):
                cluster.close()
