"""Driver, scheduler, worker: the only module that uses private parts of Dask.

Each function checks that what it needs is there, and has a fallback: taskgrad then runs without it,
only slower. ``tests/test_internals.py`` fails when a new version of Dask changes one of them.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import inspect
import logging
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import distributed.client
import distributed.worker
from distributed import Client, Future, Nanny, Scheduler, Worker
from distributed.batched import BatchedSend
from distributed.comm.addressing import get_address_host
from distributed.core import Server, Status


class _Interval(float):
    """An interval set by taskgrad, and the one it replaced."""

    before: float

    @classmethod
    def over(cls, before: float, seconds: float) -> _Interval:
        interval = cls(seconds)
        interval.before = before
        return interval


class ZeroInterval(_Interval):
    """An interval of 0 without a timer.

    After each message a stream computes ``next_deadline = time() + interval``. With a plain 0 it
    then starts a timer that has already expired, and waits for it, before the next message. Here
    the sum is None, as in a stream that has sent nothing yet: a message wakes the stream directly.
    A hop over a worker takes a fifth less time for it.
    """

    def __radd__(self, now: float) -> Any:
        return None


# Every line of BatchedSend with `next_deadline`: all of them accept None.
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
    """True if this version's streams are known to be safe with `ZeroInterval`."""
    try:
        lines = inspect.getsource(BatchedSend).splitlines()
    except (OSError, TypeError):
        return False
    return [line.strip() for line in lines if "next_deadline" in line] == _DEADLINE_LINES


def streams(server: Scheduler | Worker | Client) -> Iterator[Any]:
    """The streams from a scheduler to its workers and clients, or from one of them to it."""
    if isinstance(server, Scheduler):
        for name in ("stream_comms", "client_comms"):
            yield from getattr(server, name, {}).values()
    for name in ("batched_stream", "scheduler_comm"):  # of a worker, of a client
        stream = getattr(server, name, None)
        if stream is not None:
            yield stream


def interval_of(stream: Any) -> float | None:
    """The seconds for which a stream collects messages; None if unknown."""
    interval = getattr(stream, "interval", None)
    if isinstance(interval, bool) or not isinstance(interval, int | float):
        return None
    return interval


def set_interval(stream: Any, seconds: float) -> bool:
    """Set how long a stream collects messages; returns whether that is possible."""
    current = interval_of(stream)
    if current is None:
        return False
    kind = ZeroInterval if seconds == 0 and streams_take_none() else _Interval
    before = current.before if isinstance(current, _Interval) else current
    stream.interval = kind.over(before, seconds)
    return True


def restore_interval(stream: Any) -> None:
    """Undo `set_interval`, unless something else has set the interval since."""
    current = interval_of(stream)
    if isinstance(current, _Interval):
        stream.interval = current.before


def apply_interval(server: Scheduler | Worker | Client, interval: float | None) -> None:
    """Set the interval of all streams on which this one sends now; None restores them.

    Dask's streams batch messages for some milliseconds: 10 from a client, 5 to a worker, 2
    otherwise. A chain of dependent tasks pays about 6 ms for this at every hop, whose work takes
    less than 2. A scheduler's plugins are told of a worker after its stream was made, but of a
    client before: for a new client call this in the event loop's next turn.
    """
    for stream in streams(server):
        if interval is None:
            restore_interval(stream)
        else:
            set_interval(stream, interval)


def memory_limit(worker: Worker) -> int | None:
    """A worker's memory limit in bytes, or None."""
    limit = getattr(getattr(worker, "memory_manager", None), "memory_limit", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def memory_used(worker: Worker) -> int | None:
    """The memory of a worker's process in bytes, as Dask measures it, or None."""
    measure = getattr(getattr(worker, "monitor", None), "get_process_memory", None)
    return int(measure()) if callable(measure) else None


def pause_fraction(worker: Worker) -> float | None:
    """The fraction of its memory limit at which a worker is paused; None if it never is."""
    found = getattr(getattr(worker, "memory_manager", None), "memory_pause_fraction", None)
    return float(found) if isinstance(found, int | float) and found else None


def set_pause_fraction(worker: Worker, fraction: float) -> None:
    """Set the fraction of its memory limit at which a worker is paused."""
    worker.memory_manager.memory_pause_fraction = fraction


def timer_interval(server: Server, name: str) -> float | None:
    """The period of a server's timer in seconds; None if it has none of this name."""
    found = _timer(server, name)
    return None if found is None else found.callback_time / 1000


def set_timer_interval(server: Server, name: str, seconds: float) -> None:
    """Set the period of a timer, from its next run on."""
    found = _timer(server, name)
    if found is not None:
        found.callback_time = seconds * 1000


def _timer(server: Server, name: str) -> Any:
    """Tornado's own."""
    timers = getattr(server, "periodic_callbacks", None)
    found = timers.get(name) if isinstance(timers, dict) else None
    return found if isinstance(getattr(found, "callback_time", None), int | float) else None


def nannies_beside(scheduler: Scheduler) -> list[Server]:
    """The nannies in a scheduler's process, as in a `LocalCluster`."""
    here = list(getattr(Nanny, "_instances", ()))
    return [n for n in here if getattr(n, "scheduler_addr", None) == scheduler.address]


def nanny_that_records(ended: list[int]) -> type[Nanny]:
    """A nanny class that appends the exit status of each worker process to `ended`.

    It starts one process at a time. Dask's own starts the next while it still waits for one that
    died early to say that it runs; it takes that answer for the next one's, and its ``close``, with
    that of the whole cluster, fails with "can only join a started process".
    """

    class Recording(Nanny):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._one_start = asyncio.Lock()

        async def instantiate(self) -> Status:
            async with self._one_start:
                if self.status in (Status.closing, Status.closed, Status.closing_gracefully):
                    return self.status
                return await super().instantiate()

        def _on_worker_exit_sync(self, exitcode: int) -> None:
            ended.append(exitcode)
            super()._on_worker_exit_sync(exitcode)

    Recording.__name__ = Recording.__qualname__ = Nanny.__name__  # for logs and messages
    return Recording


def threads(worker: Worker) -> int:
    """How many tasks a worker runs at a time."""
    count = getattr(getattr(worker, "state", None), "nthreads", None)
    return count if isinstance(count, int) else 1


# The modules of the dashboard, and their names of the function from a task's name to its colour.
_COLOURS = (
    ("distributed.diagnostics.progress_stream", "color_of"),
    ("distributed.diagnostics.task_stream", "color_of"),
    ("distributed.dashboard.components.scheduler", "color_of"),
    ("distributed.dashboard.components.scheduler", "ts_color_of"),
)


def wrap_colours(colour: Callable[[str], str | None]) -> int:
    """Have the dashboards of this process ask ``colour(name)`` first, and Dask's if that is None.

    Returns how many functions were replaced: those of modules that are loaded.
    """
    count = 0
    for module, name in _COLOURS:
        stock = getattr(sys.modules.get(module), name, None)
        if callable(stock) and not hasattr(stock, "taskgrad"):
            vars(sys.modules[module]).update({name: _coloured(stock, colour)})
            count += 1
    return count


def _coloured(stock: Callable[..., Any], colour: Callable[[str], str | None]) -> Any:
    def color_of(x: Any, *args: Any, **kwargs: Any) -> Any:
        return colour(x) or stock(x, *args, **kwargs)

    color_of.taskgrad = stock  # type: ignore[attr-defined]
    return color_of


def show_in_task_stream(
    scheduler: Scheduler, worker: str, thread: int, rows: Sequence[tuple[str, str, float, float]]
) -> None:
    """Add what a worker did to the dashboard's task stream, if somebody has looked at it.

    Each row has a task's key, "compute" or "transfer", and when it began and ended, in seconds.
    """
    stream: Any = scheduler.plugins.get("task-stream")
    for key, action, start, stop in rows if stream is not None else ():
        stream.transition(
            key,
            "processing",
            "memory",
            worker=worker,
            thread=thread,
            status="OK",
            nbytes=0,
            type=b"",
            startstops=({"action": action, "start": start, "stop": stop},),
        )


def tasks_wait(worker: Worker) -> bool:
    """True if tasks wait for one of a worker's threads."""
    return bool(getattr(getattr(worker, "state", None), "ready", ()))


PORT_WARNING = r"Port \d+ is already in use"
"""What Dask's warning begins with if the dashboard cannot have its port."""
NO_SCHEDULER = "Failed to communicate with scheduler during heartbeat"
"""What a worker logs if its scheduler does not answer."""
REMOVED = "Scheduler was unaware of this worker; shutting down."
"""What a worker logs if it asks after it was removed: often when a cluster closes."""
WORKER_LOGS = ("distributed.worker", "distributed.worker.state_machine")
"""The loggers of workers whose records `ended_task` reads."""

_CANCELED = re.compile(
    r'Async instruction for <Task .*name="execute\((.*)\)".*CancelledError$', re.S
)


class EndedTask(NamedTuple):
    """What a worker's log says of a task that failed, or that ran when the worker closed."""

    key: Any
    error: str


def ended_task(record: logging.LogRecord) -> EndedTask | None:
    """The task that a record of `WORKER_LOGS` is about; None if it is about something else."""
    args = record.args
    if str(record.msg).startswith("Compute Failed\nKey:"):
        if not isinstance(args, tuple) or len(args) != 5:
            return None
        return EndedTask(args[0], str(args[3]).partition("\n")[0])
    found = None if args else _CANCELED.match(str(record.msg))
    if found is None:
        return None
    with contextlib.suppress(ValueError, SyntaxError):
        return EndedTask(ast.literal_eval(found[1]), "the worker closes")
    return None


def function_of(worker: Worker, key: Any) -> Any:
    """The function that a task on this worker calls; None if there is no such task."""
    tasks = getattr(getattr(worker, "state", None), "tasks", {})
    return getattr(getattr(tasks.get(key), "run_spec", None), "func", None)


# Every line of a worker's `get_data` that deals with the receiver. It returns when the receiver has
# all of the data, so leased memory stays valid until then.
_HANDSHAKE_LINES = [
    "if get_address_host(comm.peer_address) == get_address_host(self.address):",
    "compressed = await comm.write(msg, serializers=serializers)",
    "response = await comm.read(deserializers=serializers)",
    'assert response == "OK", response',
    "comm.abort()",
]


def results_handler(worker: Worker) -> Any:
    """The worker's `get_data` handler if its source is the version that we wrap, else None."""
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
    """Replace the worker's `get_data` handler."""
    worker.handlers["get_data"] = handler


def held_in_memory(worker: Worker, keys: Sequence[str]) -> list[Any]:
    """The results with these keys in a worker's memory; not those spilled to disk."""
    data = getattr(worker, "data", {})
    memory = getattr(data, "memory", data)
    return [memory[key] for key in keys if key in memory]


_GATHER = "get_data_from_worker"
_GATHER_TAKES = ["rpc", "keys", "worker", "who", "serializers", "deserializers"]


def wrap_gathering(wrapper: Callable[[Any], Any]) -> bool:
    """Replace the function by which workers ask each other for results by ``wrapper(function)``.

    All workers of a process share the function; it is wrapped once. Returns whether it is wrapped,
    which requires the signature that we know.
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
    """Undo `wrap_gathering`, unless the function was replaced since."""
    stock = getattr(getattr(distributed.worker, _GATHER, None), "taskgrad", None)
    if stock is not None:
        setattr(distributed.worker, _GATHER, stock)


@contextlib.contextmanager
def writing_at_once(comm: Any) -> Iterator[None]:
    """Serialize messages of a connection in the event loop.

    By default those of more than 10 MB are serialized in a thread.
    """
    before = getattr(comm, "allow_offload", None)
    if before is not None:
        comm.allow_offload = False
    try:
        yield
    finally:
        if before is not None:
            comm.allow_offload = before


def host_of(client: Client) -> str | None:
    """The local host of a client's connection to the scheduler."""
    stream = getattr(getattr(client, "scheduler_comm", None), "comm", None)
    address = getattr(stream, "local_address", "")
    return get_address_host(address) if "://" in address else None


async def results_of(
    client: Client, worker: str, keys: Sequence[Any], *, seconds: float
) -> dict[Any, Any]:
    """Those of the results that a worker has and sends, requested with the client's id.

    OSError or TimeoutError if it is gone, or has not accepted a connection in this time. Dask
    itself tries for 30 s.
    """
    ask = getattr(distributed.worker, _GATHER, None)
    if ask is None:
        return {}
    comm = await asyncio.wait_for(client.rpc.connect(worker), seconds)
    client.rpc.reuse(worker, comm)  # `ask` takes it
    response = await ask(client.rpc, list(keys), worker, who=client.id)
    found: dict[Any, Any] = response["data"] if response.get("status") == "OK" else {}
    return found


def release(client: Client, keys: Sequence[str]) -> None:
    """Release a client's keys on the scheduler even if their futures are still referenced.

    ``Client.cancel`` also cancels dependents; if one of them is not wanted by any client, the
    scheduler raises, and drops the client.
    """
    tell_scheduler(client, {"op": "client-releases-keys", "keys": list(keys), "client": client.id})


def tell_scheduler(client: Client, message: dict[str, Any]) -> None:
    """Send a message on the client's stream to the scheduler, without waiting."""
    send = getattr(client, "_send_to_scheduler", None)
    if send is not None and client.status == "running":
        send(message)


def add_client_handler(client: Client, op: str, handler: Callable[..., None]) -> bool:
    """Have a client call ``handler(**message)`` for scheduler messages with this op."""
    handlers = getattr(client, "_stream_handlers", None)
    if not isinstance(handlers, dict):
        return False
    handlers[op] = handler
    return True


_RETIRE = "retire_workers"
_RETIRE_TAKES = ["workers", "names", "close_workers", "remove", "stimulus_id", "kwargs"]


def wrap_retirement(scheduler: Scheduler, wrapper: Callable[..., Awaitable[Any]]) -> bool:
    """Have ``wrapper(retire, *args, **kwargs)`` called in place of Dask's ``retire``.

    That covers messages (of clients, adaptive clusters, workers that close themselves) and calls of
    the scheduler's method (its HTTP API). Returns whether the signature is the one that we know; if
    not, nothing is changed.
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
    """True if this retirement was requested by a worker that closes whatever the answer."""
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
    """True if a client's event loop runs in this process; its thread does not survive a fork."""
    loop: Any = client.loop
    thread = getattr(loop.asyncio_loop, "_thread_id", None)
    return any(thread == known.ident for known in threading.enumerate())
