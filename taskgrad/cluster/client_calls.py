"""Driver: coroutines in a client's event loop, waited for from other threads.

``distributed.wait`` uses the default client, which need not be ours. Its TimeoutError is part of a
reference cycle with the frames of all its callers, so futures, and with them tapes, would live
until the next garbage collection.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from distributed import CancelledError, Client, Future

from taskgrad.cluster import internals
from taskgrad.cluster.config import deadline
from taskgrad.errors import TaskgradError

T = TypeVar("T")


class LoopFuture:
    """The result of a coroutine that runs in a client's event loop, for one other thread.

    An interrupt of that thread leaves nothing locked for the event loop, as it would in the Python
    code of ``concurrent.futures`` and of conditions: the threads share a lock of C, no more.
    """

    def __init__(self, client: Client, start: Callable[[], Awaitable[Any]]) -> None:
        loop: Any = client.loop
        self._loop: asyncio.AbstractEventLoop = loop.asyncio_loop
        self._task: asyncio.Future[Any] | None = None
        self._is_done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._canceled = False
        self._held = threading.Lock()  # until it is done
        self._held.acquire()
        self._loop.call_soon_threadsafe(self._begin, start)

    def _begin(self, start: Callable[[], Awaitable[Any]]) -> None:
        async def run() -> Any:
            return await start()

        if not self._canceled:
            self._task = asyncio.ensure_future(run())
            self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Future[Any]) -> None:
        if task.cancelled():
            self._error = concurrent.futures.CancelledError()
        else:
            self._error = task.exception()
            self._value = None if self._error is not None else task.result()
        self._task = None
        self._is_done = True
        self._held.release()

    def done(self, seconds: float) -> bool:
        """True if it is done, after waiting for at most so long."""
        if not self._is_done and self._held.acquire(timeout=seconds):
            self._held.release()
        return self._is_done

    def result(self) -> Any:
        """The result, or its exception raised, once it is done; only once."""
        if self._error is not None:
            error, self._error = self._error, None  # its traceback has frames that refer to this
            raise error
        return self._value

    def cancel(self) -> None:
        """Stop the coroutine if it still runs."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._canceled = True
        if self._task is not None:
            self._task.cancel()


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
    raise unanswered(what)


def unanswered(what: str) -> TaskgradError:
    """The error of a call that is not answered in time; `what` as above."""
    return TaskgradError(
        f"the cluster was asked {what}, and has not answered for {deadline('answer'):g} s: its "
        "scheduler or a worker hangs, or is very slow. Look at the dashboard and the logs, or "
        "raise Dask's setting taskgrad.answer-deadline"
    )
