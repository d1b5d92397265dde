"""Clients are closed when Python ends, while everything still works that closing takes.

Dask's own handlers run later: when no thread and no connection can be started any more, and with
the clusters before their clients, as if all workers had been lost. Then each program that does not
close its client ends with errors in its log.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from distributed import Client

# Threads that are there because of Dask's event loop, and wait.
_OF_THE_LOOP = ("asyncio_", "Dask-Offload")

_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_first: dict[Callable[[], Any], int] = {}
"""What is to be called before clients are closed, and by which process."""


def close_at_exit(client: Client) -> None:
    """Close a client when the program ends, if it is open then."""
    _listen()
    _clients.add(client)


def at_exit(close: Callable[[], Any]) -> None:
    """Have this called when the program ends, before clients are closed; not in a forked child."""
    _listen()
    _first[close] = os.getpid()


def not_at_exit(close: Callable[[], Any]) -> None:
    """Do not call this: it was called already."""
    _first.pop(close, None)


@functools.cache
def _listen() -> None:
    early = getattr(threading, "_register_atexit", None)
    if early is not None:
        with contextlib.suppress(RuntimeError):  # the program is ending already
            early(_early, os.getpid())
    atexit.register(_close_all, os.getpid())


def _early(process: int) -> None:
    """The main thread has ended. Other threads of the program may still use what is closed."""
    here = (threading.main_thread(), threading.current_thread())
    others = [t for t in threading.enumerate() if not t.daemon and t not in here]
    if all(t.name.startswith(_OF_THE_LOOP) for t in others):
        _close_all(process)


def _close_all(process: int) -> None:
    """Close what this process has opened, and not the one that it was forked from."""
    for close, its in list(_first.items()):
        not_at_exit(close)
        if its == os.getpid():
            close()
    if process == os.getpid():
        for client in list(_clients):
            with contextlib.suppress(Exception):  # Python ends, whatever the cluster does
                client.close()
