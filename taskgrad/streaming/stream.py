"""A streaming map at work: batches of items go out as Dask tasks, results come in as messages.

    input ──▶ feeder thread ── batches ──▶ any worker ── messages ──▶ consumer: calls next()

The window bounds what is in flight. Dask places the batches, and runs those of a dead worker again
elsewhere. Only the consumer raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from distributed import CancelledError, Future
from distributed.scheduler import KilledWorker

from taskgrad.cluster.config import deadline
from taskgrad.cluster.messages import task_messages
from taskgrad.cluster.session import Session
from taskgrad.cluster.wire import process_memory
from taskgrad.cluster.wire.gather import gather_values
from taskgrad.cluster.wire.leases import BufferLease
from taskgrad.cluster.wire.thresholds import LEASE_MESSAGE_MIN, SCATTER_MIN
from taskgrad.errors import TaskgradError, TravelError, WorkerLostError
from taskgrad.executors.monitor import Outages, task_error
from taskgrad.graph.layers import kind_of
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.item_errors import item_error
from taskgrad.streaming.batch_codec import Batch
from taskgrad.streaming.feeder import Feeder
from taskgrad.streaming.serving import BatchTask, Failure, run_batch
from taskgrad.streaming.window import EMPTY, InFlight, Window

_ATTEMPTS = 3
"""How often a batch is sent whose worker died with its items or results."""
_POLL_S = 0.02
_CHECK_S = 1.0
"""Time without a message after which it is checked that there are workers."""
_RECOUNT_S = 2.0
"""Time after which the workers' threads are counted again."""


class Stream:
    """One map; `results` is what its user iterates over."""

    def __init__(
        self,
        session: Session,
        fn: Callable[..., Any],
        packed: Batch,
        inputs: Sequence[Iterator[Any]],
        window: Window,
        *,
        star: bool,
        settings: TorchSettings,
    ) -> None:
        self._session = session
        self._client = session.client
        self._fn = fn
        self._title = kind_of(fn)
        self._packed = packed
        self._window = window
        self._token = uuid.uuid4().hex
        self._star = star
        self._settings = settings
        self._leases = process_memory.available()  # workers may read large items here
        self._feeder = Feeder(inputs, window, self._send, self._title)
        self._not_sent: BaseException | None = None
        self._unread = 0
        self._outages = Outages()
        self._last_message = self._counted = time.monotonic()
        self._checked = 0.0

    # The consumer's side.

    def results(self) -> Generator[Any, None, None]:
        """The results; ends the map when it is closed, fails, or is garbage."""
        try:
            task_messages.subscribe(self._client, self._token, self)
            task_messages.broadcast_put(self._client, self._token, self._packed)
            self._feeder.start()
            while (batch := self._next_answered()) is not None:
                results = self._fetched(batch)
                if results is None:
                    self._send_again(batch)
                    continue
                batch.release(items=True)
                yield from self._values(batch, results)
                self._window.remove(batch)
        finally:
            try:
                self._stop(wait=not self._client.asynchronous)
            except BaseException:  # it was interrupted
                self._stop(wait=False)
                raise

    def _values(self, batch: InFlight, results: Batch) -> Iterator[Any]:
        index = batch.first
        failure = batch.failure
        try:
            for value in results:
                self._window.yielded += 1
                index += 1
                yield value
        except TravelError as error:
            failure = Failure(error)
        if failure is not None:
            if failure.of_item:
                where = self._session.named(batch.ran_on)
                raise item_error(failure.error, index, self._fn, where, failure.frames)
            raise failure.error

    def _fetched(self, batch: InFlight) -> Batch | None:
        """The results: from the message, from the worker's memory, or gathered from the task.

        None if they were lost with their worker, and Dask could not compute them again.
        """
        if batch.results is not None:
            try:
                return batch.results.fetch()
            except OSError:  # its worker is gone, or on another host
                self._unread += 1
                self._leases = self._leases and self._unread < _ATTEMPTS
        if batch.future is None:  # of a batch that failed before it began
            return EMPTY
        pending = gather_values(self._client, [batch.future], [""])
        try:
            while not pending.done(_POLL_S):
                self._check()
            [results] = pending.result()
        except (OSError, asyncio.CancelledError, CancelledError, KilledWorker):
            return None
        finally:
            pending.cancel()
        return results if isinstance(results, Batch) else None

    def _send_again(self, batch: InFlight) -> None:
        if batch.attempts >= _ATTEMPTS:
            raise WorkerLostError(
                f"the results of {batch.label(self._title)} were on "
                f"{self._session.describe(batch.ran_on)}, and are lost, for the {_ATTEMPTS}rd "
                "time. Look at the workers' logs"
            )
        with self._window.lock:
            batch.results = batch.failure = None
            self._window.send_again(batch, answered=True)

    def _next_answered(self) -> InFlight | None:
        """Wait for the batch to yield next; None at the end."""
        window, feeder = self._window, self._feeder
        while True:
            with window.lock:
                found = window.next()
                if found is not None:
                    return found
                if feeder.is_done() and not window.batches:
                    if feeder.error is not None:
                        raise feeder.error
                    return None
                batch = window.resend.popleft() if window.resend else feeder.flush(stale=True)
                seen = window.version
            if batch is not None:
                self._send(batch)
            elif not window.wait_for_change(seen, _POLL_S):
                self._check()

    def _send(self, batch: InFlight) -> None:
        window = self._window
        if window.stopped:
            return
        try:
            future = self._submit(batch)
            with window.lock:
                if window.stopped or batch.answered:
                    future.release()
                else:
                    batch.future = future
        except BaseException as error:
            self._not_sent = error  # `_check` raises it in the consumer's thread

    def _submit(self, batch: InFlight) -> Future:
        """Send a batch, for the first time or again; its task's future is the caller's to hold.

        By ``client.map`` and not as a node through an executor: Dask places these tasks, runs those
        of a worker that died on another one, and takes large items as frames, not pickled.
        """
        items: Batch | Future = batch.items
        client, leases = self._client, self._leases
        batch.scattered = None
        if leases and batch.nbytes >= LEASE_MESSAGE_MIN:
            batch.lease = BufferLease()
            items = batch.items.leased(batch.lease)
        elif batch.nbytes >= SCATTER_MIN:
            with contextlib.suppress(OSError):  # its worker just closed: then with the task
                items = batch.scattered = client.scatter(
                    batch.items, hash=False, timeout=deadline("answer"), asynchronous=False
                )
        task = BatchTask(self._token, client.id, batch.number, self._star, leases, self._settings)
        key = (f"imap-{self._title}-{self._token}", batch.number, batch.attempts)
        batch.attempts += 1
        [future] = client.map(run_batch, [task], [items], key=[key], pure=False, fifo_timeout="0 s")
        return future

    def _check(self) -> None:
        """Raise for failures of which no message comes."""
        where = f"after {self._window.yielded} results of the map of {self._title!r}"
        if self._client.status != "running":
            raise TaskgradError(
                f"the connection to the scheduler is {self._client.status}, {where}. Is "
                "the scheduler closed, or the client? Open a client, and map the rest again"
            )
        if self._not_sent is not None:
            raise TaskgradError(f"items could not be sent, {where}") from self._not_sent
        with self._window.lock:
            waiting = [(batch, batch.future) for batch in self._window.unanswered()]
        for batch, future in waiting:
            ended = future is not None and future.status != "pending" and not batch.answered
            if future is not None and ended and batch.future is future:
                self._ended_without_answer(batch, future)
        now = time.monotonic()
        if waiting and now - max(self._last_message, self._checked) > _CHECK_S:
            if self._last_message > self._checked:
                self._outages = Outages()
            self._checked = now
            self._check_workers(waiting[0][0])

    def _ended_without_answer(self, batch: InFlight, future: Future) -> None:
        items = batch.label(self._title)
        if future.status == "error":
            error = task_error(future, items)
            if isinstance(error, WorkerLostError):
                raise error
            raise TaskgradError(f"{items} could not be run: {error}") from error
        if batch.attempts < _ATTEMPTS and batch.scattered:
            self._send(batch)
            return
        if future.status == "finished":
            raise TaskgradError(f"{items} ended without an answer")
        raise TaskgradError(
            f"{items} were cancelled: by somebody else, by a restart of the cluster, or because "
            "the connection to the scheduler was lost. Map the rest again"
        )

    def _check_workers(self, batch: InFlight) -> None:
        known = {w.address for w in self._session.known()}
        trouble = self._session.out_of_order(known) if known else {"": "gone"}
        if len(self._outages.lasting(trouble)) >= max(1, len(known)):
            why = "are paused: their memory is nearly full" if known else "are gone"
            raise WorkerLostError(
                f"{batch.label(self._title)} wait for a worker, and for longer than Dask's setting "
                f"taskgrad.worker-deadline all workers {why}. Start some, or raise it"
            )

    def _stop(self, *, wait: bool) -> None:
        """Release everything; again if it was. The garbage collector may call this, in any thread.

        If asked to, wait for the feeder's thread.
        """
        self._window.stop()
        task_messages.broadcast_delete(self._client, self._token)
        self._feeder.stop(wait=wait)

    # In the client's event loop.

    def receive(self, message: dict[str, Any], worker: str) -> None:
        """Handle a message from the task of a batch."""
        window = self._window
        with window.lock:
            batch = window.batches.get(message["number"])
            self._last_message = time.monotonic()
            if batch is None or batch.answered:
                return  # its task ran twice
            if message.get("unreadable"):
                self._leases = False
                window.send_again(batch, answered=False)
                return
            batch.ran_on = worker
            batch.results = message.get("results")
            batch.failure = message.get("failure")
            if message["whole"]:  # else its task may have to run again
                batch.release(items=True)
            if batch.failure is None:
                nbytes = max(batch.nbytes, message["nbytes"])
                window.sizing.ran(batch.count, message["seconds"], nbytes)
                batch.nbytes = nbytes
            window.answered(batch)
            if self._last_message - self._counted > _RECOUNT_S:
                self._counted = self._last_message
                loop: Any = self._client.loop
                loop.add_callback(self._count)

    async def _count(self) -> None:
        """Count the workers' threads again."""
        scheduler: Any = self._client.scheduler
        threads = sum((await scheduler.ncores(workers=None)).values())
        self._window.set_threads(max(1, threads))
