"""A streaming map at work: chunks of its input go out as Dask tasks, results come in as letters.

    input ──▶ feeder thread ── chunks ──▶ any worker ── letters ──▶ consumer: whoever calls next()

The feeder pulls items while there is room: so many chunks at work, so many items pulled and not
yielded. It is a thread of its own so that an input that blocks does not hold back results that are
there. Dask places the chunks, and runs those of a dead worker again elsewhere. Only the consumer
raises.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from distributed import CancelledError, Client
from distributed.scheduler import KilledWorker

from taskgrad.cluster import client_calls
from taskgrad.cluster.config import deadline
from taskgrad.cluster.messages import task_messages
from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError, TravelError, WorkerLostError
from taskgrad.graph.layers import kind_of
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.item_errors import item_error
from taskgrad.streaming import chunk_size
from taskgrad.streaming.batch_codec import Packer, Parcel
from taskgrad.streaming.sending import NOTHING, Sender, Sent
from taskgrad.streaming.serving import Failure

_ATTEMPTS = 3
"""How often items that went straight to a worker are sent again, when it is gone."""
_AT_WORK = 3
"""Chunks sent and not answered, for each thread: one runs, one waits there, one is on its way."""
_HELD = 8
"""Chunks sent and not yielded, for each thread."""
_STALE = 0.01
"""Seconds after which the items of a chunk are sent though it is not full: the input is slow."""
_GLANCE = 0.02
_LOOK = 1.0
"""Seconds without a letter after which it is asked whether there are workers."""
_COUNT = 2.0
"""Seconds after which the workers' threads are counted again."""
_JOIN = 1.0
"""Seconds that `close` gives an input to end what it is doing."""


class Stream:
    """One map; `results` is what its user iterates over."""

    def __init__(
        self,
        session: Session,
        fn: Callable[..., Any],
        packed: Parcel,
        inputs: Sequence[Iterator[Any]],
        *,
        star: bool,
        length: int | None,
        threads: int,
        unordered: bool,
        chunksize: int | None,
        buffersize: int | None,
        settings: TorchSettings,
    ) -> None:
        self._client = session.client
        self._session = session
        self._fn = fn
        self._packed = packed
        self._inputs = inputs
        self._length = length
        self._threads = threads
        self._unordered = unordered
        self._buffersize = buffersize
        if chunksize is None and buffersize is not None:
            self._most = max(1, buffersize // (2 * threads))
        else:
            self._most = buffersize or 1 << 62
        self._sizing = chunk_size.Sizing(chunksize, threads)
        self._token = uuid.uuid4().hex
        self._name = f"imap-{kind_of(fn)}-{self._token}"

        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open: Packer | None = None
        self._open_size = 1
        self._open_since = 0.0
        self._sent: dict[int, Sent] = {}
        self._answered: deque[int] = deque()
        self._again: deque[Sent] = deque()
        self._numbers = 0
        self._pulled = 0
        self._yielded = 0
        self._next = 0
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None
        self._broken: BaseException | None = None
        self._sender = Sender(self._client, self._name, self._token, star, settings)
        self._unread = 0
        self._news = self._counted = time.monotonic()
        self._looked = 0.0
        self._alone_since: float | None = None
        self._feeder = threading.Thread(target=self._feed, name="taskgrad-imap-input", daemon=True)

    # The consumer's side.

    def results(self) -> Iterator[Any]:
        """The results; ends the map when it is closed, fails, or is let go."""
        try:
            task_messages.receive(self._client, self._token, self)
            task_messages.leave(self._client, self._token, self._packed)
            self._feeder.start()
            while (sent := self._next_answered()) is not None:
                results = self._fetched(sent)
                if results is None:
                    self._redo(sent)
                    continue
                sent.let_go()
                sent.items = NOTHING
                yield from self._values(sent, results)
                self._done(sent)
        finally:
            self._stop()

    def _values(self, sent: Sent, results: Parcel) -> Iterator[Any]:
        index = sent.first
        failure = sent.failure
        try:
            for value in results:
                self._yielded += 1
                index += 1
                yield value
        except TravelError as error:
            failure = Failure(error)
        if failure is not None:
            if failure.of_item:
                raise item_error(failure.error, index, self._fn, sent.worker, failure.frames)
            raise failure.error

    def _fetched(self, sent: Sent) -> Parcel | None:
        """The results: from the letter, from the worker's memory, or asked of the worker.

        None if they went with their worker, and Dask could not make them again.
        """
        if sent.results is not None:
            try:
                return sent.results.fetch()
            except OSError:  # its worker is gone, or on another host
                self._unread += 1
                self._sender.lend = self._sender.lend and self._unread < _ATTEMPTS
        if sent.future is None:  # of a chunk that failed before it began
            return NOTHING
        pending = client_calls.values(
            self._client, [sent.future], [""]
        )  # from wherever they are now
        try:
            while not pending.done(_GLANCE):
                self._look()
            [results] = pending.result()
        except (OSError, asyncio.CancelledError, CancelledError, KilledWorker):
            return None
        finally:
            pending.cancel()
        return results if isinstance(results, Parcel) else None

    def _redo(self, sent: Sent) -> None:
        """Send a chunk again whose results are lost."""
        if sent.attempts >= _ATTEMPTS:
            raise WorkerLostError(
                f"the results of {self._items(sent)} were on worker {sent.worker}, and are lost, "
                f"for the {_ATTEMPTS}rd time. Look at the workers' logs"
            )
        sent.let_go()
        with self._changed:
            sent.answered = False
            sent.results = sent.failure = None
            if not self._unordered:
                self._next = sent.number
            self._again.append(sent)

    def _next_answered(self) -> Sent | None:
        """The chunk to yield next, once it is there; None at the end."""
        while True:
            with self._changed:
                sent = self._take_answered()
                if sent is not None:
                    return sent
                if self._ended and not self._sent and self._open is None:
                    if self._error is not None:
                        raise self._error
                    return None
                chunk = self._again.popleft() if self._again else self._close_open(stale=True)
                waited = chunk is None and not self._changed.wait(_GLANCE)
            if chunk is not None:
                self._send(chunk)
            if waited:
                self._look()

    def _take_answered(self) -> Sent | None:
        if self._unordered:
            return self._sent[self._answered.popleft()] if self._answered else None
        sent = self._sent.get(self._next)
        if sent is None or not sent.answered:
            return None
        self._next += 1
        return sent

    def _done(self, sent: Sent) -> None:
        with self._changed:
            del self._sent[sent.number]
            self._changed.notify_all()

    def _look(self) -> None:
        """Raise if something is wrong that no letter tells of."""
        if self._client.status != "running":
            raise TaskgradError(
                f"the connection to the scheduler is {self._client.status}, {self._where()}. Is "
                "the scheduler closed, or the client? Open a client, and map the rest again"
            )
        if self._broken is not None:
            raise TaskgradError(f"items could not be sent, {self._where()}") from self._broken
        with self._changed:
            waited = [(s, s.future) for s in self._sent.values() if not s.answered]
        for sent, future in waited:
            status = "pending" if future is None else future.status
            if status != "pending" and not sent.answered and sent.future is future:
                self._ended_otherwise(sent, status)
        if time.monotonic() - max(self._news, self._looked) > _LOOK:
            self._looked = time.monotonic()
            self._look_for_workers()

    def _ended_otherwise(self, sent: Sent, status: str | None) -> None:
        """A task has ended, and no letter came before: what was it?"""
        items, future = self._items(sent), sent.future
        assert future is not None
        if status == "error":
            error = client_calls.answer(self._client, future._exception, "why a task failed")
            if isinstance(error, KilledWorker):
                raise WorkerLostError(
                    f"{items} were on {error.allowed_failures + 1} workers one after the other, "
                    f"and each died; the last was {error.last_worker.address}. Look at the "
                    "workers' logs: an item may need too much memory, or end the process "
                    "(os._exit, os.abort). Dask's setting "
                    "distributed.scheduler.allowed-failures says how many it may take"
                ) from error
            raise TaskgradError(f"{items} could not be run: {error}") from error
        if sent.attempts < _ATTEMPTS and sent.scattered:
            self._send(sent)
            return
        if status == "finished":
            raise TaskgradError(f"{items} ended without an answer")
        raise TaskgradError(
            f"{items} were cancelled: by somebody else, by a restart of the cluster, or because "
            "the connection to the scheduler was lost. Map the rest again"
        )

    def _look_for_workers(self) -> None:
        with self._changed:
            waited = [s for s in self._sent.values() if not s.answered]
        if not waited:
            return
        known = {w.address for w in self._session.known()}
        trouble = self._session.out_of_order(known) if known else {}
        now = time.monotonic()
        if len(trouble) < len(known):
            self._alone_since = None
            return
        self._alone_since = self._alone_since or now
        seconds = deadline("worker")
        if now - self._alone_since > seconds:
            why = "are paused: their memory is nearly full" if known else "are gone"
            raise WorkerLostError(
                f"{self._items(waited[0])} wait for a worker, and for {seconds:g} s all workers "
                f"{why}. Start some, or raise Dask's setting taskgrad.worker-deadline"
            )

    def _where(self) -> str:
        return f"after {self._yielded} results of the map of {kind_of(self._fn)!r}"

    def _items(self, sent: Sent) -> str:
        return f"items {sent.first} to {sent.last} of the map of {kind_of(self._fn)!r}"

    def _stop(self) -> None:
        """Let everything go. May be called by the garbage collector, in any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            sent = list(self._sent.values())
            self._sent.clear()
            self._open = None
        for one in sent:
            one.let_go()
        task_messages.drop(self._client, self._token)
        if self._feeder.ident is None:
            _close(self._inputs)
        elif threading.current_thread() is not self._feeder and not _in_loop(self._client):
            self._feeder.join(_JOIN)

    # In the client's event loop.

    def receive(self, letter: dict[str, Any], worker: str) -> None:
        """A letter came."""
        with self._changed:
            sent = self._sent.get(letter["number"])
            self._news = time.monotonic()
            self._alone_since = None
            if sent is None or sent.answered:
                return  # its task ran twice
            if letter.get("unreadable"):
                self._sender.lend = False
                sent.let_go()
                self._again.append(sent)
                self._changed.notify_all()
                return
            sent.answered = True
            sent.worker = worker
            sent.results = letter.get("results")
            sent.failure = letter.get("failure")
            if letter["whole"]:  # else its task may have to run again
                sent.let_go()
                sent.items = NOTHING
            if sent.failure is None:
                nbytes = max(sent.nbytes, letter["nbytes"])
                self._sizing.ran(sent.count, letter["seconds"], nbytes)
                sent.nbytes = nbytes
            self._answered.append(sent.number)
            self._changed.notify_all()
            if self._news - self._counted > _COUNT:
                self._counted = self._news
                loop: Any = self._client.loop
                loop.add_callback(self._count)

    async def _count(self) -> None:
        """Workers may have come, or gone."""
        scheduler: Any = self._client.scheduler
        threads = sum((await scheduler.ncores(workers=None)).values())
        with self._changed:
            self._threads = self._sizing.threads = max(1, threads)
            self._changed.notify_all()

    # The feeder's side.

    def _feed(self) -> None:
        error: BaseException | None = None
        source = self._inputs[0] if len(self._inputs) == 1 else zip(*self._inputs, strict=False)
        lock = self._lock
        try:
            wanted = self._room()
            while wanted:
                for item in source:
                    with lock:
                        chunk = self._take(item)
                    if chunk is not None:
                        break
                else:
                    break
                item = None
                self._send(chunk)
                wanted = self._room()
        except BaseException as raised:  # it is the consumer's to see
            error = raised
        try:
            _close(self._inputs)
        except BaseException as raised:
            error = error or raised
        with self._changed:
            chunk = None if self._stopped else self._close_open()
        if chunk is not None:
            self._send(chunk)
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()

    def _room(self) -> bool:
        """Wait until items may be pulled; False once none is wanted any more."""
        with self._changed:
            while not self._stopped:
                size = self._next_size()
                if size:
                    self._open_size = size
                    return True
                self._changed.wait()
            return False

    def _next_size(self) -> int:
        """How many items the next chunk may have."""
        sent = self._sent.values()
        at_work = sum(not s.answered for s in sent)
        if at_work >= _AT_WORK * self._threads or len(sent) >= _HELD * self._threads:
            return 0
        nbytes = sum(s.nbytes for s in sent)
        if len(sent) >= self._threads and nbytes >= _HELD * self._threads * chunk_size.NBYTES:
            return 0
        left = None if self._length is None else max(1, self._length - self._pulled)
        size = min(self._sizing.next(left), self._most)
        if self._buffersize is not None:
            size = min(size, self._buffersize - (self._pulled - self._yielded))
        return max(0, size)

    def _take(self, item: Any) -> Sent | None:
        """Pack an item; returns the chunk that is full with it."""
        packer = self._open
        if packer is None:
            packer = self._open = Packer()
            self._open_since = time.monotonic()
        try:
            packer.add(item)
        except Exception as error:
            raise self._unsendable(item, error) from error
        self._pulled += 1
        if self._stopped or packer.count >= self._open_size or packer.nbytes >= chunk_size.NBYTES:
            return self._close_open()
        return None

    def _unsendable(self, item: Any, error: Exception) -> TravelError:
        kind = type(item)
        return TravelError(
            f"item {self._pulled} of the map of {kind_of(self._fn)!r} cannot be sent to a worker: "
            f"a {kind.__module__}.{kind.__qualname__} ({type(error).__name__}: {error})"
        )

    def _close_open(self, stale: bool = False) -> Sent | None:
        """The chunk that is being made, taken out; if asked so, only when it waits for long."""
        packer = self._open
        if packer is None or (stale and time.monotonic() - self._open_since < _STALE):
            return None
        self._open = None
        self._open_size = max(1, self._open_size - packer.count)
        items = packer.parcel()
        count = len(items)
        sent = Sent(self._numbers, self._pulled - count, count, items, items.nbytes)
        self._numbers += 1
        self._sent[sent.number] = sent
        return sent

    def _send(self, sent: Sent) -> None:
        if self._stopped:
            return
        try:
            self._submit(sent)
        except BaseException as error:
            self._broken = error  # the consumer looks

    def _submit(self, sent: Sent) -> None:
        future = self._sender.submit(sent)
        with self._changed:
            if self._stopped or sent.answered:
                future.release()
            else:
                sent.future = future


def _close(inputs: Sequence[Iterator[Any]]) -> None:
    """Close those that are generators; a file, say, is not ours to close."""
    for one in inputs:
        if isinstance(one, Generator):
            one.close()


def _in_loop(client: Client) -> bool:
    """Whether this is the thread of the client's event loop."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return False
    loop: Any = client.loop
    return running is loop.asyncio_loop
