"""Mailboxes for the messages between ranks of a parallel call: one for each of their tasks.

A message names its task by the task's key, the rank that sent it, and the exchange: the ranks that
take part, and its number among those of the same ranks, counted from 0. It may arrive before its
task has begun. When the task has ended, or its key was released, its mailbox is deleted;
later messages are refused, and the sender is told the outcome.

A rank's task may run the ranks of another map inside. Each has a mailbox of its own, with the
task's key and more for a key (`inner_key`); it is dropped with that of the task.

A `Transport` delivers messages to other workers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from taskgrad.errors import TaskgradError
from taskgrad.worker_names import WorkerName

# How many ended tasks are remembered; the ranks of a group end within a message of each other.
_MAX_ENDED = 10_000
# In keys, between that of a task and that of a rank inside.
_INNER = "|"


def inner_key(key: str, number: int, index: int) -> str:
    """The key of a rank, by index, of the map of this number inside the task `key`."""
    return f"{key}{_INNER}{number}.{index}"


class ExchangeId(NamedTuple):
    """Which exchange: its ranks, ascending, and its number among those of the same ranks."""

    ranks: tuple[int, ...]
    number: int


class Message(NamedTuple):
    """A message of one rank to another in one collective."""

    source: int
    exchange: ExchangeId
    what: str
    wants: bool  # True if the sender needs a gradient for what it sent
    store: str  # the id of the sender's store: another one after a restart
    payload: list[Any]


class Waiting(NamedTuple):
    """A rank that waits in an exchange, its collective of this number, for `missing` ranks."""

    what: str
    number: int
    exchange: ExchangeId
    missing: tuple[int, ...]


@dataclass(frozen=True)
class TaskOutcome:
    """The end of a task: it returned after `count` collectives, or raised `error`."""

    count: int
    error: BaseException | None


class GroupAborted(BaseException):
    """Ends a rank because its group cannot go on. No Exception: no rank's code shall catch it.

    Attributes
    ----------
    error : BaseException
        What the rank's task raises: another rank's error, or why the collective failed.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Transport(Protocol):
    """Delivers messages to other workers. Only `give_thread_back` may block."""

    def send(
        self, worker: str, messages: Sequence[tuple[str, Message]], client: str = ""
    ) -> Future[list[TaskOutcome | None]]:
        """Deliver messages, each to the task of a key; the outcomes of those that have ended.

        A payload that several have is sent once. The tasks are this client's, which may have linked
        the workers. OSError: worker gone.
        """

    def tell(self, worker: str, key: str, error: BaseException) -> Future[None]:
        """Make a task fail with this error."""

    def attend(self, worker: str, key: str) -> Future[TaskOutcome | None]:
        """The outcome of a task once it has ended; None after some time. OSError: as above."""

    def waiting(self, worker: str, key: str, exchange: ExchangeId) -> Future[Waiting | None]:
        """As `Mailboxes.waiting`, on another worker. OSError: as above."""

    def give_thread_back(self) -> None:
        """Let the worker run another task in place of the one in this thread."""


@dataclass
class _Box:
    news: threading.Condition  # notified when all that is awaited has come, or never will
    awaited: set[tuple[int, ExchangeId]] = field(default_factory=set)
    messages: dict[tuple[int, ExchangeId], Message] = field(default_factory=dict)
    stores: dict[int, str] = field(default_factory=dict)
    error: BaseException | None = None
    lost: Callable[[str], BaseException | None] | None = None  # once the task has begun
    wake: Callable[[], None] | None = None
    begun: Callable[[ExchangeId], bool] = lambda exchange: False
    waits: Waiting | None = None  # then `missing` are all whose messages it needs
    gone: set[str] = field(default_factory=set)
    inner: list[str] = field(default_factory=list)  # the keys of ranks inside that have begun
    since: float = field(default_factory=time.monotonic)


class Mailboxes:
    """The mailboxes of one worker. Safe from several threads.

    `worker` names the worker, `store` is the id of its store, with which they are dropped.
    ``is_released(key)`` is True if no client needs the task's result any more.
    """

    def __init__(
        self,
        is_released: Callable[[str], bool] = lambda key: False,
        *,
        worker: WorkerName | None = None,
        store: str = "",
    ) -> None:
        self.worker = worker
        self.store = store
        self.transport: Transport | None = None
        self._is_released = is_released
        self._boxes: dict[str, _Box] = {}
        self._ended: OrderedDict[str, TaskOutcome] = OrderedDict()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # for `until`

    def open(
        self,
        key: str,
        lost: Callable[[str], BaseException | None],
        wake: Callable[[], None] | None = None,
        begun: Callable[[ExchangeId], bool] = lambda exchange: False,
    ) -> None:
        """The task with this key has begun. It may have before, if Dask runs it again.

        `lost` returns the error with which it fails when the worker of this address is gone, or
        None if it does not. `wake` is called when there is news, for a task that waits otherwise.
        `begun` says whether it has begun an exchange.
        """
        with self._lock:
            self._ended.pop(key, None)
            box = self._box(key)
            box.lost, box.wake, box.begun = lost, wake, begun
            around, is_inner, _ = key.rpartition(_INNER)
            outer = self._boxes.get(around) if is_inner else None
            if outer is not None:
                outer.inner.append(key)
                if outer.error is not None:
                    self._fail(box, outer.error)
            if box.error is None and self._is_released(key):
                self._fail(box, _released())

    def end(self, key: str, end: TaskOutcome) -> None:
        """The task has ended: delete its mailbox."""
        with self._lock:
            box = self._boxes.pop(key, None)
            if box is not None:
                self._drop_inside(key, box.inner)
                self._ended[key] = end
                if len(self._ended) > _MAX_ENDED:
                    self._ended.popitem(last=False)
            self._news.notify_all()

    def release(self, keys: Iterable[str]) -> None:
        """These keys were released: tasks that still run fail at their next collective."""
        with self._lock:
            for key in keys:
                box = self._boxes.get(key)
                if box is not None and box.lost is not None:
                    self._fail(box, _released())
                elif self._boxes.pop(key, None) is not None:
                    self._drop_inside(key, [])
                if key in self._ended:
                    self._ended[key] = TaskOutcome(0, _released())  # its error may be large

    def gone(self, worker: str) -> None:
        """The worker of this address is gone: tasks that run with it fail."""
        with self._lock:
            for box in self._boxes.values():
                error = box.lost(worker) if box.lost is not None else None
                if error is not None:
                    box.gone.add(worker)
                    self._fail(box, error)

    def cut_off(self, worker: str, error: BaseException) -> None:
        """What the worker of this address has sent may be lost: tasks that run with it fail."""
        with self._lock:
            for box in self._boxes.values():
                if box.lost is not None and box.lost(worker) is not None:
                    self._fail(box, error)

    def deliver(self, key: str, message: Message) -> TaskOutcome | None:
        """Take a message for a task; returns the outcome of the task if it has ended."""
        with self._lock:
            end = self.ended(key)
            if end is not None:
                return end
            if key not in self._boxes and self._is_released(key.partition(_INNER)[0]):
                return TaskOutcome(0, _released())
            box = self._box(key)
            if box.stores.setdefault(message.source, message.store) != message.store:
                restarted = (
                    f"rank {message.source} has begun a second time: its worker was restarted"
                )
                self._fail(box, TaskgradError(restarted))
            box.messages[message.source, message.exchange] = message
            if box.awaited:
                box.awaited.discard((message.source, message.exchange))
                if not box.awaited:
                    box.news.notify_all()
        return None

    def fail(self, key: str, error: BaseException) -> None:
        """Make a task fail at its next collective, or now if it waits in one."""
        with self._lock:
            task = key.partition(_INNER)[0]
            if key in self._boxes or not (self.ended(key) or self._is_released(task)):
                self._fail(self._box(key), error)

    def ended(self, key: str) -> TaskOutcome | None:
        """The outcome of a task, or of the one around it; None if neither has ended."""
        while True:
            end = self._ended.get(key)
            key, is_inner, _ = key.rpartition(_INNER)
            if end is not None or not is_inner:
                return end

    def error(self, key: str) -> BaseException | None:
        """The error with which a task is to fail, if any."""
        box = self._boxes.get(key)
        return box.error if box is not None else None

    def is_gone(self, key: str, worker: str) -> bool:
        """True if this worker was lost while the task ran."""
        box = self._boxes.get(key)
        return box is not None and worker in box.gone

    def wait(
        self, key: str, exchange: ExchangeId, sources: Sequence[int], seconds: float
    ) -> set[int]:
        """Wait at most so long for a message of each of these ranks; returns those still missing.

        Raises GroupAborted if the task has to fail.
        """
        box = self._boxes[key]

        def missing() -> set[int]:
            return {s for s in sources if (s, exchange) not in box.messages}

        with self._lock:
            if seconds > 0:  # else another thread may be the one that waits
                box.awaited = {(s, exchange) for s in missing()}
                box.news.wait_for(lambda: box.error is not None or not missing(), seconds)
            if box.error is not None:
                raise GroupAborted(box.error)
            return missing()

    def waits(self, key: str, waits: Waiting | None) -> None:
        """The task waits from now on for messages of the `missing` ranks; or no more."""
        self._boxes[key].waits = waits

    def waiting(self, key: str, exchange: ExchangeId) -> Waiting | None:
        """In what a task waits, unless it has begun this exchange."""
        with self._lock:
            box = self._boxes.get(key)
            if box is None or box.waits is None or box.error is not None or box.begun(exchange):
                return None
            waits = box.waits
            missing = [s for s in waits.missing if (s, waits.exchange) not in box.messages]
            return waits._replace(missing=tuple(missing)) if missing else None

    def take(self, key: str, exchange: ExchangeId, sources: Sequence[int]) -> list[Message]:
        """The messages of one collective, once all have come.

        Raises GroupAborted if the task has to fail, by now.
        """
        with self._lock:
            box = self._boxes[key]
            if box.error is not None:
                raise GroupAborted(box.error)
            return [box.messages.pop((source, exchange)) for source in sources]

    def expire(self, seconds: float) -> None:
        """Drop the messages of tasks that have not begun for so long: they never will."""
        old = time.monotonic() - seconds
        with self._lock:
            for key in [k for k, b in self._boxes.items() if b.lost is None and b.since < old]:
                del self._boxes[key]

    def close(self) -> None:
        """The worker closes."""
        with self._lock:
            for box in self._boxes.values():
                self._fail(box, TaskgradError("the worker of a rank closes"))
            self._boxes = {k: b for k, b in self._boxes.items() if b.lost is not None}
            self._news.notify_all()

    def held(self) -> dict[str, int]:
        """The numbers of mailboxes and messages."""
        with self._lock:
            boxes = list(self._boxes.values())
            return {"mailboxes": len(boxes), "messages": sum(len(b.messages) for b in boxes)}

    def wake(self, *_: Any) -> None:
        """Wake all waiters, so that they check their conditions."""
        with self._lock:
            self._news.notify_all()

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait so long for something that ends with a call of `wake`."""
        with self._lock:
            return self._news.wait_for(condition, seconds)

    def _box(self, key: str) -> _Box:
        found = self._boxes.get(key)
        if found is None:
            found = self._boxes[key] = _Box(threading.Condition(self._lock))
        return found

    def _fail(self, box: _Box, error: BaseException) -> None:
        box.error = box.error or error
        box.messages.clear()
        box.news.notify_all()
        self._news.notify_all()
        if box.wake is not None:
            box.wake()
        for key in box.inner:
            if key in self._boxes:
                self._fail(self._boxes[key], error)

    def _drop_inside(self, key: str, begun: Sequence[str]) -> None:
        """Drop what there is of the ranks inside a task; those that have begun are these."""
        for inner in begun:
            self._ended.pop(inner, None)
        for inner in [k for k in self._boxes if k.startswith(key + _INNER)]:
            del self._boxes[inner]


def _released() -> BaseException:
    return TaskgradError("the call was released before all of its ranks had run")
