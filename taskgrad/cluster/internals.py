"""The one place where taskgrad touches what Dask keeps to itself.

Each function here looks whether what it needs is there, and has an answer for when it is not: then
taskgrad runs on as it would without, only slower. ``tests/test_internals.py`` fails when a new
version of Dask moves something, so that we notice before users do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import distributed.client
import distributed.worker
from distributed import Client, Future, Nanny, Scheduler, Worker
from distributed.batched import BatchedSend
from distributed.comm.addressing import get_address_host
from distributed.core import Server


class _Interval(float):
    """An interval that we set, with the one that was there before."""

    before: float

    @classmethod
    def over(cls, before: float, seconds: float) -> _Interval:
        interval = cls(seconds)
        interval.before = before
        return interval


class ZeroInterval(_Interval):
    """An interval of 0 that costs nothing.

    After each message a stream computes ``next_deadline = time() + interval``. With a plain 0 it
    then makes a timer that has already run out, and waits for it, before it looks at the next
    message. For a stream that has sent nothing yet ``next_deadline`` is None, and so it is here: a
    message wakes the stream directly. A hop over a worker takes a fifth less time for it.
    """

    def __radd__(self, now: float) -> Any:
        return None


# Every line of BatchedSend that says `next_deadline`: among them nothing that cannot take a None.
_DEADLINE_LINES = [
    "self.next_deadline = None",
    "yield self.waker.wait(self.next_deadline)",
    "self.next_deadline = None",
    "if self.next_deadline is not None and time() < self.next_deadline:",
    "self.next_deadline = time() + self.interval",
    "if self.next_deadline is None:",
]


@functools.cache
def streams_take_none() -> bool:
    """Whether streams treat deadlines as we know it, so that `ZeroInterval` is safe with them."""
    try:
        lines = inspect.getsource(BatchedSend).splitlines()
    except (OSError, TypeError):
        return False
    return [line.strip() for line in lines if "next_deadline" in line] == _DEADLINE_LINES


def scheduler_streams(scheduler: Scheduler) -> Iterator[Any]:
    """The scheduler's streams to its workers and clients."""
    for name in ("stream_comms", "client_comms"):
        streams = getattr(scheduler, name, None)
        if isinstance(streams, dict):
            yield from streams.values()


def worker_streams(worker: Worker) -> Iterator[Any]:
    """A worker's stream to the scheduler."""
    yield from _attribute(worker, "batched_stream")


def client_streams(client: Client) -> Iterator[Any]:
    """A client's stream to the scheduler."""
    yield from _attribute(client, "scheduler_comm")


def interval_of(stream: Any) -> float | None:
    """For how many seconds a stream collects messages; None if it does not say."""
    interval = getattr(stream, "interval", None)
    if isinstance(interval, bool) or not isinstance(interval, int | float):
        return None
    return interval


def set_interval(stream: Any, seconds: float) -> bool:
    """Make a stream collect messages for so long; returns whether it can be told."""
    current = interval_of(stream)
    if current is None:
        return False
    kind = ZeroInterval if seconds == 0 and streams_take_none() else _Interval
    before = current.before if isinstance(current, _Interval) else current
    stream.interval = kind.over(before, seconds)
    return True


def restore_interval(stream: Any) -> None:
    """Give a stream back the interval that it had; leaves alone what somebody else set since."""
    current = interval_of(stream)
    if isinstance(current, _Interval):
        stream.interval = current.before


def memory_limit(worker: Worker) -> int | None:
    """A worker's memory limit in bytes, or None."""
    limit = getattr(getattr(worker, "memory_manager", None), "memory_limit", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def memory_used(worker: Worker) -> int | None:
    """What Dask takes for the memory of a worker's process, in bytes, or None."""
    measure = getattr(getattr(worker, "monitor", None), "get_process_memory", None)
    return int(measure()) if callable(measure) else None


def pause_fraction(worker: Worker) -> float | None:
    """The part of its memory limit from which on a worker is paused; None if it never is."""
    found = getattr(getattr(worker, "memory_manager", None), "memory_pause_fraction", None)
    return float(found) if isinstance(found, int | float) and found else None


def set_pause_fraction(worker: Worker, fraction: float) -> None:
    """Have a worker be paused from this part of its memory limit on."""
    worker.memory_manager.memory_pause_fraction = fraction


def timer_interval(server: Server, name: str) -> float | None:
    """Seconds between two runs of one of a server's timers; None if it has none of this name."""
    found = _timer(server, name)
    return None if found is None else found.callback_time / 1000


def set_timer_interval(server: Server, name: str, seconds: float) -> None:
    """Have a timer run every so many seconds, from the next time on."""
    found = _timer(server, name)
    if found is not None:
        found.callback_time = seconds * 1000


def _timer(server: Server, name: str) -> Any:
    """Tornado's own."""
    timers = getattr(server, "periodic_callbacks", None)
    found = timers.get(name) if isinstance(timers, dict) else None
    return found if isinstance(getattr(found, "callback_time", None), int | float) else None


def nannies_beside(scheduler: Scheduler) -> list[Server]:
    """Those of a scheduler's nannies that are in its process, as in a `LocalCluster`."""
    here = list(getattr(Nanny, "_instances", ()))
    return [n for n in here if getattr(n, "scheduler_addr", None) == scheduler.address]


def nanny_that_records(ended: list[int]) -> type[Nanny]:
    """A nanny that adds to `ended` the exit status of each of its worker processes."""

    class Recording(Nanny):
        def _on_worker_exit_sync(self, exitcode: int) -> None:
            ended.append(exitcode)
            super()._on_worker_exit_sync(exitcode)

    Recording.__name__ = Recording.__qualname__ = Nanny.__name__  # for logs and messages
    return Recording


def threads(worker: Worker) -> int:
    """How many tasks a worker runs at a time."""
    count = getattr(getattr(worker, "state", None), "nthreads", None)
    return count if isinstance(count, int) else 1


# Every line of a worker's handler for results that deals with the receiver. It ends only when the
# receiver has all of the data, not before: so long may what was sent lie in this worker's memory.
_HANDSHAKE_LINES = [
    "if get_address_host(comm.peer_address) == get_address_host(self.address):",
    "compressed = await comm.write(msg, serializers=serializers)",
    "response = await comm.read(deserializers=serializers)",
    'assert response == "OK", response',
    "comm.abort()",
]


def results_handler(worker: Worker) -> Any:
    """The handler that gives a worker's results to who asks, if it is as we know it, else None."""
    handlers = getattr(worker, "handlers", None)
    handler: Any = handlers.get("get_data") if isinstance(handlers, dict) else None
    try:
        lines = [line.strip() for line in inspect.getsource(handler).splitlines()]
        named = {"comm", "keys", "who"} <= inspect.signature(handler).parameters.keys()
    except (OSError, TypeError, ValueError):
        return None
    found = [line for line in lines if "comm." in line or "response" in line]
    return handler if named and found == _HANDSHAKE_LINES else None


def set_results_handler(worker: Worker, handler: Any) -> None:
    """Have a worker give its results away by this handler from now on."""
    worker.handlers["get_data"] = handler


def held_in_memory(worker: Worker, keys: Sequence[str]) -> list[Any]:
    """The results with these keys that a worker has, but for those that it spilled to disk."""
    data = getattr(worker, "data", {})
    memory = getattr(data, "memory", data)
    return [memory[key] for key in keys if key in memory]


_GATHER = "get_data_from_worker"
_GATHER_TAKES = ["rpc", "keys", "worker", "who", "serializers", "deserializers"]


def wrap_gathering(wrapper: Callable[[Any], Any]) -> bool:
    """Have ``wrapper(gather)`` ask other workers for results, in place of Dask's ``gather``.

    That is one function for all workers of a process; it is wrapped once. Returns whether it is,
    which takes that it is as we know it.
    """
    gather = getattr(distributed.worker, _GATHER, None)
    if hasattr(gather, "taskgrad"):
        return True
    if not callable(gather) or list(inspect.signature(gather).parameters) != _GATHER_TAKES:
        return False
    wrapped = wrapper(gather)
    wrapped.taskgrad = gather
    setattr(distributed.worker, _GATHER, wrapped)
    return True


def unwrap_gathering() -> None:
    """Undo `wrap_gathering`, unless somebody has put another over it."""
    stock = getattr(getattr(distributed.worker, _GATHER, None), "taskgrad", None)
    if stock is not None:
        setattr(distributed.worker, _GATHER, stock)


@contextlib.contextmanager
def writing_at_once(comm: Any) -> Iterator[None]:
    """Have a connection make its messages where it is, in the event loop.

    Those of more than 10 MB it makes in a thread beside it, as some are a second's work.
    """
    before = getattr(comm, "allow_offload", None)
    if before is not None:
        comm.allow_offload = False
    try:
        yield
    finally:
        if before is not None:
            comm.allow_offload = before


def _attribute(owner: Any, name: str) -> Iterator[Any]:
    found = getattr(owner, name, None)
    if found is not None:
        yield found


def host_of(client: Client) -> str | None:
    """The host of this end of a client's connection to the scheduler."""
    stream = getattr(getattr(client, "scheduler_comm", None), "comm", None)
    address = getattr(stream, "local_address", "")
    return get_address_host(address) if "://" in address else None


async def results_of(
    client: Client, worker: str, keys: Sequence[Any], *, seconds: float
) -> dict[Any, Any]:
    """Those of the results that a worker has and gives, asked for by the client in its own name.

    Raises
    ------
    OSError, TimeoutError
        It is gone, or has not taken a connection within so many seconds. Dask itself tries for 30.
    """
    ask = getattr(distributed.worker, "get_data_from_worker", None)
    if ask is None:
        return {}
    comm = await asyncio.wait_for(client.rpc.connect(worker), seconds)
    client.rpc.reuse(worker, comm)  # `ask` takes it
    response = await ask(client.rpc, list(keys), worker, who=client.id)
    found: dict[Any, Any] = response["data"] if response.get("status") == "OK" else {}
    return found


def release(client: Client, keys: Sequence[str]) -> None:
    """Tell the scheduler that a client wants these keys no more, though somebody has their futures.

    ``Client.cancel`` is not for this: it also cancels the tasks that depend on a key, and on one of
    those that nobody wants by itself the scheduler stumbles, and drops the client.
    """
    tell_scheduler(client, {"op": "client-releases-keys", "keys": list(keys), "client": client.id})


def tell_scheduler(client: Client, message: dict[str, Any]) -> None:
    """Send a message with the client's stream to the scheduler, and wait for nothing."""
    send = getattr(client, "_send_to_scheduler", None)
    if send is not None and client.status == "running":
        send(message)


def add_client_handler(client: Client, op: str, handler: Callable[..., None]) -> bool:
    """Have a client call ``handler(**message)`` for messages of this kind from the scheduler."""
    handlers = getattr(client, "_stream_handlers", None)
    if not isinstance(handlers, dict):
        return False
    handlers[op] = handler
    return True


_RETIRE = "retire_workers"
_RETIRE_TAKES = ["workers", "names", "close_workers", "remove", "stimulus_id", "kwargs"]


def wrap_retirement(scheduler: Scheduler, wrapper: Callable[..., Awaitable[Any]]) -> bool:
    """Have ``wrapper(retire, *args, **kwargs)`` called in place of Dask's ``retire``.

    So for messages (of clients, adaptive clusters, workers that close themselves) and for those who
    call the scheduler's method (its HTTP API). Returns whether the scheduler has that as we know
    it; if not, nothing is changed.
    """
    retire = getattr(scheduler, "handlers", {}).get(_RETIRE)
    if not callable(retire) or list(inspect.signature(retire).parameters) != _RETIRE_TAKES:
        return False

    @functools.wraps(retire)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        return await wrapper(retire, *args, **kwargs)

    scheduler.handlers[_RETIRE] = wrapped
    setattr(scheduler, _RETIRE, wrapped)
    return True


def is_closing_itself(stimulus_id: str | None) -> bool:
    """Whether a retirement with this id is that of a worker which closes in any case then."""
    return (stimulus_id or "").startswith("worker-close-gracefully")


async def settle(futures: Sequence[Future]) -> None:
    """Return when each of these futures has a result or an error, or one was cancelled."""
    all_of = getattr(distributed.client, "_wait", None)
    if inspect.iscoroutinefunction(all_of):
        await all_of(list(futures))
        return
    while any(future.status == "pending" for future in futures):
        await asyncio.sleep(0.01)


def loop_runs(client: Client) -> bool:
    """Whether the thread of a client's event loop is in this process; a fork leaves it behind."""
    loop: Any = client.loop
    thread = getattr(loop.asyncio_loop, "_thread_id", None)
    return any(thread == known.ident for known in threading.enumerate())
