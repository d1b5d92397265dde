"""Waiting: for futures, a moment at a time and without raising; for answers, with a deadline.

``distributed.wait`` goes through the default client, which need not be ours, and its TimeoutError
leaves a cycle through the frames of everybody above it: futures would live until the next garbage
collection, and with them tapes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from distributed import CancelledError, Client, Future

from taskgrad.cluster import internals
from taskgrad.cluster.config import deadline
from taskgrad.cluster.wire import gather
from taskgrad.errors import TaskgradError

T = TypeVar("T")


class Pending:
    """Something that runs in a client's event loop until it is done or `cancel` is called."""

    def __init__(self, client: Client, start: Callable[[], Awaitable[Any]]) -> None:
        async def run() -> Any:
            return await start()

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

    return Pending(client, settle)


def values(client: Client, futures: Sequence[Future], workers: Sequence[str]) -> Pending:
    """Done once the values of these futures, which ran on these workers, are here."""
    return Pending(client, lambda: gather.values(client, futures, workers))


def answer(client: Client, ask: Callable[[], Awaitable[T]], what: str) -> T:
    """What the scheduler and the workers answer to a question, asked in the client's event loop.

    Raises
    ------
    TaskgradError
        They cannot be reached, or have not answered within ``taskgrad.answer-deadline``.
    """
    seconds = deadline("answer")
    pending = Pending(client, ask)
    try:
        if pending.done(seconds):
            found: T = pending.result()
            return found
    except OSError as error:
        raise TaskgradError(
            f"a connection was lost while the cluster was asked {what} ({type(error).__name__}: "
            f"{error}). Look whether its scheduler and workers still run, and try again"
        ) from error
    finally:
        pending.cancel()
    raise TaskgradError(
        f"the cluster was asked {what}, and has not answered for {seconds:g} s: its scheduler or "
        "a worker hangs, or is very slow. Look at the dashboard and the logs, or raise Dask's "
        "setting taskgrad.answer-deadline"
    )
