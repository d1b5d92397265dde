"""Driver: coroutines in a client's event loop, waited for from other threads.

``distributed.wait`` uses the default client, which need not be ours. Its TimeoutError is part of a
reference cycle with the frames of all its callers, so futures, and with them tapes, would live
until the next garbage collection.
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
from taskgrad.errors import TaskgradError

T = TypeVar("T")


class LoopFuture:
    """The result of a coroutine that runs in a client's event loop."""

    def __init__(self, client: Client, start: Callable[[], Awaitable[Any]]) -> None:
        async def run() -> Any:
            return await start()

        loop: Any = client.loop
        self._future = asyncio.run_coroutine_threadsafe(run(), loop.asyncio_loop)

    def done(self, seconds: float) -> bool:
        """True if it is done, after waiting for at most so long."""
        return bool(concurrent.futures.wait([self._future], seconds).done)

    def result(self) -> Any:
        """The result, or its exception raised, once it is done."""
        return self._future.result()

    def cancel(self) -> None:
        """Stop the coroutine if it still runs."""
        self._future.cancel()


def all_of(client: Client, futures: Sequence[Future]) -> LoopFuture:
    """Done once each of these futures has a result, an error, or was cancelled."""

    async def settle() -> None:
        # The caller finds cancelled ones by looking at each.
        with contextlib.suppress(asyncio.CancelledError, CancelledError):
            await internals.settle(futures)

    return LoopFuture(client, settle)


def call_with_deadline(client: Client, call: Callable[[], Awaitable[T]], what: str) -> T:
    """The answer of scheduler or workers to a call; `what` completes "they are asked ...".

    TaskgradError if they cannot be reached, or do not answer within ``taskgrad.answer-deadline``.
    """
    seconds = deadline("answer")
    pending = LoopFuture(client, call)
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
