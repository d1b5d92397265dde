"""Worker: messages between the ranks of a parallel call, over Dask's RPC.

Each worker has four more handlers, which others call as they call Dask's:

    taskgrad_rank_message   messages for tasks: their tensors are frames of their own
    taskgrad_rank_fail      the error with which a task is to fail
    taskgrad_rank_outcome   how did a task end? Answered when it has, or after some seconds
    taskgrad_rank_waiting   in what does a task wait?

While it waits for an outcome, a rank notices at once when the other's process dies: the connection
breaks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from distributed import Worker
from distributed.protocol.serialize import to_serialize

from taskgrad import remote_errors
from taskgrad.cluster.channels.links import Link
from taskgrad.cluster.closing import stop_answering
from taskgrad.cluster.config import deadline
from taskgrad.cluster.nested import give_thread_back
from taskgrad.worker.mailbox import ExchangeId, Mailboxes, Message, TaskOutcome, Waiting

T = TypeVar("T")

_MESSAGE, _FAIL = "taskgrad_rank_message", "taskgrad_rank_fail"
_OUTCOME, _WAITING = "taskgrad_rank_outcome", "taskgrad_rank_waiting"
_LONG_POLL_S = 5.0
_CHECK_S = 0.05


class DaskTransport:
    """One worker's messages to others (a `taskgrad.worker.mailbox.Transport`).

    Those to a worker to which the client has a link, ``link_to(worker, client)``, go over that.
    """

    def __init__(
        self, worker: Worker, mailboxes: Mailboxes, link_to: Callable[[str, str], Link | None]
    ) -> None:
        self._worker = worker
        self._link_to = link_to
        self._mailboxes = mailboxes
        self._expired = time.monotonic()
        worker.handlers[_MESSAGE] = self._receive
        worker.handlers[_FAIL] = self._receive_error
        worker.handlers[_OUTCOME] = self._answer_outcome
        worker.handlers[_WAITING] = self._answer_waiting
        mailboxes.transport = self

    def stop(self) -> None:
        """Called when the worker closes."""
        self._mailboxes.transport = None
        self._mailboxes.close()
        stop_answering(self._worker, _MESSAGE, _FAIL, _OUTCOME, _WAITING)

    def send(
        self, worker: str, messages: Sequence[tuple[str, Message]], client: str = ""
    ) -> Future[list[TaskOutcome | None]]:
        """Deliver messages; see `Transport`."""
        if worker == self._worker.address:
            return _done([_own(self._mailboxes.deliver(key, m)) for key, m in messages])
        link = self._link_to(worker, client)
        if link is not None:
            return link.send(worker, messages)
        payloads = {_identity(m): m.payload for _, m in messages}
        at = {payload: i for i, payload in enumerate(payloads)}
        heads = [(key, at[_identity(m)], *m._replace(payload=[])) for key, m in messages]
        return self._start(
            self._call(
                worker, _MESSAGE, heads=heads, payloads=to_serialize(list(payloads.values()))
            )
        )

    def tell(self, worker: str, key: str, error: BaseException) -> Future[None]:
        """Have a task fail with this error; see `Transport`."""
        if worker == self._worker.address:
            self._mailboxes.fail(key, remote_errors.loads(remote_errors.dumps(error)))
            return _done(None)
        return self._start(self._call(worker, _FAIL, key=key, error=remote_errors.dumps(error)))

    def attend(self, worker: str, key: str) -> Future[TaskOutcome | None]:
        """How a task ended; see `Transport`."""
        return self._start(self._call(worker, _OUTCOME, key=key))

    def waiting(self, worker: str, key: str, exchange: ExchangeId) -> Future[Waiting | None]:
        """In what a task waits; see `Transport`."""
        return self._start(self._call(worker, _WAITING, key=key, exchange=exchange))

    def give_thread_back(self) -> None:
        """Let the worker run another task in place of the one in this thread."""
        give_thread_back()

    def _start(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        loop: Any = self._worker.loop
        return asyncio.run_coroutine_threadsafe(call, loop.asyncio_loop)

    async def _call(self, worker: str, handler: str, **message: Any) -> Any:
        try:
            answer = await getattr(self._worker.rpc(worker), handler)(**message)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{worker} does not answer: {error}") from error
        if handler == _WAITING:
            return None if answer is None else _waiting(answer)
        return [_outcome(one) for one in answer] if handler == _MESSAGE else _outcome(answer)

    def _receive(self, heads: Sequence[Any], payloads: Any) -> list[dict[str, Any] | None]:
        self._expire()
        ends = []
        for key, at, source, exchange, *rest, _ in heads:
            fields: Any = (source, _exchange(exchange), *rest, payloads[at])
            ends.append(_plain(self._mailboxes.deliver(key, Message(*fields))))
        return ends

    def _receive_error(self, key: str, error: bytes) -> None:
        self._mailboxes.fail(key, remote_errors.loads(error))

    async def _answer_outcome(self, key: str) -> dict[str, Any] | None:
        until = time.monotonic() + _LONG_POLL_S
        while self._mailboxes.ended(key) is None and time.monotonic() < until:
            await asyncio.sleep(_CHECK_S)
        return _plain(self._mailboxes.ended(key))

    def _answer_waiting(self, key: str, exchange: Sequence[Any]) -> Waiting | None:
        return self._mailboxes.waiting(key, _exchange(exchange))

    def _expire(self) -> None:
        """Once per deadline, drop messages for tasks that have never begun."""
        seconds = deadline("collective")
        if time.monotonic() - self._expired > seconds:
            self._expired = time.monotonic()
            self._mailboxes.expire(seconds)


def _identity(message: Message) -> tuple[int, ...]:
    """The same for two messages of the same tensors."""
    return tuple(map(id, message.payload))


def _exchange(sent: Sequence[Any]) -> ExchangeId:
    """An exchange as it was before msgpack made lists of its tuples."""
    ranks, number = sent
    return ExchangeId(tuple(ranks), number)


def _waiting(sent: Sequence[Any]) -> Waiting:
    """The same for who waits in what."""
    what, number, exchange, missing = sent
    return Waiting(what, number, _exchange(exchange), tuple(missing))


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _own(end: TaskOutcome | None) -> TaskOutcome | None:
    """An outcome with an error that this task alone raises, as if it had been sent."""
    if end is None or end.error is None:
        return end
    return TaskOutcome(end.count, remote_errors.loads(remote_errors.dumps(end.error)))


def _outcome(answer: dict[str, Any] | None) -> TaskOutcome | None:
    """Undo `_plain`."""
    if answer is None:
        return None
    return TaskOutcome(answer["count"], answer["error"] and remote_errors.loads(answer["error"]))


def _plain(end: TaskOutcome | None) -> dict[str, Any] | None:
    """An outcome as msgpack can send it."""
    if end is None:
        return None
    return {"count": end.count, "error": end.error and remote_errors.dumps(end.error)}
