"""Driver, scheduler, worker: messages from running tasks to their client; broadcast to workers.

    task ── message ──▶ scheduler ── message ──▶ client

A Dask task's result is known only when it has ended, and then takes two more messages each way to
fetch. These messages carry results to the client, with the streams that worker and client keep open
to the scheduler, which does not deserialize them. Dask's own way, ``Worker.log_event`` with
``Client.subscribe_topic``, cannot: it sends only what msgpack can, no tensors, and the scheduler
keeps every event in its log.

A broadcast value is put on the scheduler once, under a token. The first task on a worker that needs
it gets it there, for all others. When the client deletes it, or is gone, so do the scheduler and
those workers.
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

_MESSAGE = "taskgrad-message"
_PUT = "taskgrad_broadcast_put"
_GET = "taskgrad_broadcast_get"
_DELETE = "taskgrad-broadcast-delete"


class TaskMessages(SchedulerPlugin):
    """Scheduler: forwards messages, and keeps broadcast values."""

    name = "taskgrad-messages"
    idempotent = True

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, Any]] = {}  # client and value, by token
        self._holders: dict[str, set[str]] = defaultdict(set)  # workers, by token

    async def start(self, scheduler: Scheduler) -> None:
        """Called once on the scheduler."""
        self._scheduler = scheduler
        scheduler.handlers[_PUT] = self._put
        scheduler.handlers[_GET] = self._get
        scheduler.stream_handlers[_MESSAGE] = self._forward
        scheduler.stream_handlers[_DELETE] = self._delete

    def _put(self, client: str, token: str, value: Any) -> None:
        if client in self._scheduler.clients:
            self._values[token] = client, value

    def _get(self, worker: str, token: str) -> dict[str, Any]:
        # Between threads of one process, Dask deserializes only what is in a container.
        if token not in self._values:
            return {"value": None}
        self._holders[token].add(worker)
        return {"value": self._values[token][1]}

    def _forward(self, client: str, token: str, message: Any, worker: str) -> None:
        stream = self._scheduler.client_comms.get(client)
        if stream is not None:
            stream.send({"op": _MESSAGE, "token": token, "message": message, "worker": worker})

    def _delete(self, client: str, token: str) -> None:
        self._values.pop(token, None)
        for worker in self._holders.pop(token, ()):
            if worker in self._scheduler.stream_comms:
                self._scheduler.worker_send(worker, {"op": _DELETE, "token": token})

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Delete what this client has broadcast."""
        for token in [t for t, (owner, _) in self._values.items() if owner == client]:
            self._delete(client, token)


# Driver.

_receivers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_subscribed: weakref.WeakSet[Client] = weakref.WeakSet()


def subscribe(client: Client, token: str, receiver: Any) -> None:
    """Have ``receiver.receive(message, worker)`` called for each message with this token.

    It is called in the client's loop, and referenced weakly.
    """
    _receivers[token] = receiver
    if client not in _subscribed:
        client_calls.call_with_deadline(
            client, lambda: client.register_plugin(TaskMessages()), "to forward messages of tasks"
        )
        if not internals.add_client_handler(client, _MESSAGE, _receive):
            raise TaskgradError("this version of Dask has no place for messages from tasks")
        _subscribed.add(client)


def _receive(token: str, message: Any, worker: str) -> None:
    receiver = _receivers.get(token)
    if receiver is not None:
        receiver.receive(message, worker)


def broadcast_put(client: Client, token: str, value: Any) -> None:
    """Put a value on the scheduler, for `broadcast_get`; Dask must be able to serialize it."""
    call = functools.partial(getattr(client.scheduler, _PUT), client=client.id, token=token)
    client_calls.call_with_deadline(
        client, lambda: call(value=to_serialize(value)), "to keep a function"
    )


def broadcast_delete(client: Client, token: str) -> None:
    """Delete the value on the scheduler and workers, and end the subscription; does not wait."""
    _receivers.pop(token, None)
    internals.tell_scheduler(client, {"op": _DELETE, "token": token})


# Worker, in the threads of tasks.

_values: weakref.WeakKeyDictionary[Worker, dict[str, Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def send(worker: Worker, client: str, token: str, message: dict[str, Any]) -> None:
    """Send a message. It arrives before the end of the task that sent it is known.

    A worker that has lost the scheduler, or closes, drops it.
    """
    whole = {"op": _MESSAGE, "client": client, "token": token, "message": message}
    worker.loop.add_callback(worker.batched_send, whole)


def broadcast_values(worker: Worker) -> dict[str, Any]:
    """The values that this worker has got and that are not deleted, by token."""
    return _values.setdefault(worker, {})


def broadcast_get(worker: Worker, token: str, load: Callable[[Any], Any]) -> Any:
    """The value under a token, loaded once a worker; None if it has been deleted."""
    values = broadcast_values(worker)
    with _lock:
        if token in values:
            return values[token]
        values[token] = None  # removed again if the deletion arrives first
        worker.stream_handlers[_DELETE] = lambda token: values.pop(token, None)
        ask = functools.partial(getattr(worker.scheduler, _GET), worker=worker.address)
        try:
            answer = sync(worker.loop, ask, token=token, callback_timeout=deadline("answer"))
            loaded = None if answer["value"] is None else load(answer["value"])
        except BaseException:
            values.pop(token, None)
            raise
        if loaded is None or token not in values:
            values.pop(token, None)
            return None
        values[token] = loaded
        return loaded
