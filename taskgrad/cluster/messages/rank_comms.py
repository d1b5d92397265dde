"""Messages between the ranks of a parallel call, over Dask's own connections.

Each worker has three handlers more, which others call as they call Dask's:

    taskgrad_mail      a message for a task: its tensors are frames of their own
    taskgrad_fail      the error with which a task is to fail
    taskgrad_attend    how did a task end? Answered when it has, or after some seconds

While it waits for an answer to the last one, a rank notices at once when the other's process goes:
the connection breaks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from distributed import Worker
from distributed.protocol.serialize import to_serialize

from taskgrad import remote_errors
from taskgrad.cluster.config import deadline
from taskgrad.cluster.nested import give_thread_back
from taskgrad.worker.mailbox import End, Mail, Message

logger = logging.getLogger("taskgrad")

_MAIL, _FAIL, _ATTEND = "taskgrad_mail", "taskgrad_fail", "taskgrad_attend"
# Seconds for which a question after a task waits for its end, and between two looks at it.
_ATTENTION = 5.0
_LOOK = 0.05


class Post:
    """What carries one worker's messages (a `taskgrad.worker.mailbox.Carrier`)."""

    def __init__(self, worker: Worker, mail: Mail) -> None:
        self._worker = worker
        self._mail = mail
        self._cleaned = time.monotonic()
        worker.handlers[_MAIL] = self._take
        worker.handlers[_FAIL] = self._take_error
        worker.handlers[_ATTEND] = self._tell_end
        mail.carrier = self

    def stop(self) -> None:
        """The worker closes."""
        self._mail.carrier = None
        self._mail.close()
        for name in (_MAIL, _FAIL, _ATTEND):
            self._worker.handlers.pop(name, None)

    def send(self, worker: str, key: str, message: Message) -> Future[End | None]:
        """Deliver a message; see `Carrier`."""
        head, parcel = message._replace(parcel=[]), message.parcel
        return self._start(
            self._ask(worker, _MAIL, key=key, head=tuple(head), parcel=to_serialize(parcel))
        )

    def tell(self, worker: str, key: str, error: BaseException) -> Future[None]:
        """Have a task fail with this error; see `Carrier`."""
        return self._start(self._ask(worker, _FAIL, key=key, error=remote_errors.dumps(error)))

    def attend(self, worker: str, key: str) -> Future[End | None]:
        """How a task ended; see `Carrier`."""
        return self._start(self._ask(worker, _ATTEND, key=key))

    def give_thread_back(self) -> None:
        """Let the worker run another task in place of the one in this thread."""
        give_thread_back()

    def _start(self, sending: Coroutine[Any, Any, Any]) -> Future[Any]:
        loop: Any = self._worker.loop
        return asyncio.run_coroutine_threadsafe(sending, loop.asyncio_loop)

    async def _ask(self, worker: str, handler: str, **message: Any) -> End | None:
        try:
            answer = await getattr(self._worker.rpc(worker), handler)(**message)
        except OSError:
            raise
        except Exception as error:  # such as: it has no such handler, because it closes
            raise OSError(f"{worker} does not answer: {error}") from error
        if answer is None:
            return None
        return End(answer["count"], answer["error"] and remote_errors.loads(answer["error"]))

    def _take(self, key: str, head: tuple[Any, ...], parcel: Any) -> dict[str, Any] | None:
        self._clean()
        message = Message(*head)._replace(parcel=parcel)
        return _end(self._mail.deliver(key, message))

    def _take_error(self, key: str, error: bytes) -> None:
        self._mail.fail(key, remote_errors.loads(error))

    async def _tell_end(self, key: str) -> dict[str, Any] | None:
        until = time.monotonic() + _ATTENTION
        while self._mail.ended(key) is None and time.monotonic() < until:
            await asyncio.sleep(_LOOK)
        return _end(self._mail.ended(key))

    def _clean(self) -> None:
        """Now and then drop what came for tasks that have never begun."""
        seconds = deadline("collective")
        if time.monotonic() - self._cleaned > seconds:
            self._cleaned = time.monotonic()
            self._mail.expire(seconds)


def _end(end: End | None) -> dict[str, Any] | None:
    if end is None:
        return None
    return {"count": end.count, "error": end.error and remote_errors.dumps(end.error)}
