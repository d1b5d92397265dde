"""Letters from a running task to its driver, and functions that the scheduler keeps for tasks.

A Dask task says nothing before it has ended, and then its driver has to fetch what it gave: two
more messages each way. A letter goes with the worker's own stream to the scheduler and with the
scheduler's to the client, unopened:

    task ── letter ──▶ scheduler ── letter ──▶ driver

A function is left with the scheduler once, under a token. The first task on a worker that needs it
takes it from there. When the driver lets go of the token, or is gone, the scheduler forgets it and
tells those workers to.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from distributed import Client, Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.serialize import to_serialize
from distributed.utils import sync

from taskgrad.cluster import client_calls, internals
from taskgrad.cluster.config import deadline
from taskgrad.errors import TaskgradError

_LETTER = "taskgrad-letter"
_DROP = "taskgrad-drop"
_LEAVE = "taskgrad_leave"
_TAKE = "taskgrad_take"

_boxes: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_known: weakref.WeakSet[Client] = weakref.WeakSet()


class Letters(SchedulerPlugin):
    """The scheduler's part: passes letters on, keeps what was left with it."""

    name = "taskgrad-letters"
    idempotent = True

    def __init__(self) -> None:
        self._left: dict[str, tuple[str, Any]] = {}
        self._takers: dict[str, set[str]] = defaultdict(set)

    async def start(self, scheduler: Scheduler) -> None:
        """Called once on the scheduler."""
        self._scheduler = scheduler
        scheduler.handlers[_LEAVE] = self._leave
        scheduler.handlers[_TAKE] = self._take
        scheduler.stream_handlers[_LETTER] = self._pass_on
        scheduler.stream_handlers[_DROP] = self._drop

    def _leave(self, client: str, token: str, thing: Any) -> None:
        if client in self._scheduler.clients:
            self._left[token] = client, thing

    def _take(self, worker: str, token: str) -> dict[str, Any]:
        # In a dictionary: between threads of one process, Dask opens only what lies in a container.
        if token not in self._left:
            return {"thing": None}
        self._takers[token].add(worker)
        return {"thing": self._left[token][1]}

    def _pass_on(self, client: str, token: str, letter: Any, worker: str) -> None:
        stream = self._scheduler.client_comms.get(client)
        if stream is not None:
            stream.send({"op": _LETTER, "token": token, "letter": letter, "worker": worker})

    def _drop(self, client: str, token: str) -> None:
        self._left.pop(token, None)
        for worker in self._takers.pop(token, ()):
            if worker in self._scheduler.stream_comms:
                self._scheduler.worker_send(worker, {"op": _DROP, "token": token})

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """What it left is nobody's now."""
        for token in [t for t, (owner, _) in self._left.items() if owner == client]:
            self._drop(client, token)


# On the driver.


def receive(client: Client, token: str, box: Any) -> None:
    """From now on call ``box.receive(letter, worker)`` in the client's loop for each letter.

    The box is not kept alive.
    """
    _boxes[token] = box
    if client not in _known:
        client_calls.answer(client, lambda: client.register_plugin(Letters()), "to pass letters on")
        if not internals.add_client_handler(client, _LETTER, _receive):
            raise TaskgradError("this version of Dask has no place for letters from tasks")
        _known.add(client)


def _receive(token: str, letter: Any, worker: str) -> None:
    box = _boxes.get(token)
    if box is not None:
        box.receive(letter, worker)


def leave(client: Client, token: str, thing: Any) -> None:
    """Leave something with the scheduler, for `take`; it must be serializable for Dask."""

    async def send() -> None:
        call = getattr(client.scheduler, _LEAVE)
        await call(client=client.id, token=token, thing=to_serialize(thing))

    client_calls.answer(client, send, "to keep a function")


def drop(client: Client, token: str) -> None:
    """Have the scheduler and the workers forget this token; waits for nobody."""
    _boxes.pop(token, None)
    internals.tell_scheduler(client, {"op": _DROP, "token": token})


# On a worker, in a task's thread.

_taken: weakref.WeakKeyDictionary[Worker, dict[str, Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def write(worker: Worker, client: str, token: str, letter: dict[str, Any]) -> None:
    """Send a letter. It arrives before the end of the task that wrote it is known."""
    message = {"op": _LETTER, "client": client, "token": token, "letter": letter}
    stream: Any = worker.batched_stream
    worker.loop.add_callback(stream.send, message)


def taken(worker: Worker) -> dict[str, Any]:
    """What this worker has taken and not been told to forget, by token."""
    return _taken.setdefault(worker, {})


def take(worker: Worker, token: str, load: Callable[[Any], Any]) -> Any:
    """What was left under a token, loaded once a worker; None if it is not there any more."""
    mine = taken(worker)
    with _lock:
        if token in mine:
            return mine[token]
        mine[token] = None  # taken out again, should the word to forget it come first
        worker.stream_handlers[_DROP] = functools.partial(_forget, mine)
        ask = functools.partial(getattr(worker.scheduler, _TAKE), worker=worker.address)
        try:
            answer = sync(worker.loop, ask, token=token, callback_timeout=deadline("answer"))
            thing = answer["thing"]
            loaded = None if thing is None else load(thing)
        except BaseException:
            mine.pop(token, None)
            raise
        if loaded is None or token not in mine:
            mine.pop(token, None)
            return None
        mine[token] = loaded
        return loaded


def _forget(mine: dict[str, Any], token: str) -> None:
    mine.pop(token, None)
