"""Waiting for futures, a moment at a time and without raising.

``distributed.wait`` goes through the default client, which need not be ours, and its TimeoutError
leaves a cycle through the frames of everybody above it: futures would live until the next garbage
collection, and with them tapes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Any

from distributed import CancelledError, Client, Future

from taskgrad.cluster import internals


class Pending:
    """Something that runs in a client's event loop until it is done or `cancel` is called."""

    def __init__(self, client: Client, awaitable: Awaitable[Any]) -> None:
        async def run() -> Any:
            return await awaitable

        loop: Any = client.loop
        self._future = asyncio.run_coroutine_threadsafe(run(), loop.asyncio_loop)

    def done(self, seconds: float) -> bool:
        """Whether it is done, after waiting for so long at most."""
        return bool(concurrent.futures.wait([self._future], seconds).done)

    def result(self) -> Any:
        """What it gave, once it is done; raises what it raised."""
        return self._future.result()

    def cancel(self) -> None:
        """Stop it, if it still runs."""
        self._future.cancel()


def all_of(client: Client, futures: Sequence[Future]) -> Pending:
    """Done once each of these futures has a result, an error, or was cancelled."""

    async def settle() -> None:
        # Where one was cancelled, whoever waits finds out by looking at each.
        with contextlib.suppress(asyncio.CancelledError, CancelledError):
            await internals.settle(futures)

    return Pending(client, settle())


def values(client: Client, futures: Sequence[Future]) -> Pending:
    """Done once the values of these futures are here."""
    coming: Any = client.gather(list(futures), asynchronous=True)
    return Pending(client, coming)
