"""Driver: connections to programs on some workers, and what these workers said on them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import dask
from distributed import Client, Future
from distributed.comm.core import Comm, connect

from taskgrad import remote_errors
from taskgrad.cluster import client_calls, internals
from taskgrad.cluster.changes import Changes
from taskgrad.cluster.config import deadline, device_groups
from taskgrad.cluster.program_host import PROGRAM, run_program
from taskgrad.cluster.scheduler_plugin import ANNOTATION
from taskgrad.cluster.wire import message_values
from taskgrad.errors import TaskgradError
from taskgrad.executors.task_stream import Row, TaskStream
from taskgrad.worker_names import WorkerName

# Up to so many bytes Dask need not look at a message to tell whether a thread should serialize it.
_AT_ONCE_MAX = 1 << 20
# Each of two ways to connect workers may take this part of the time that an answer may.
_TRIES = 3
_SOCKETS_S = 10.0  # for the first way at most: a firewall may drop what it does not let pass


logger = logging.getLogger("taskgrad")


class Connections:
    """One connection to each of some workers, which run programs: `kind` is what for.

    With `links` they run none: ranks that run as tasks send each other messages over the channels.

    Methods block until messages are written, or a deadline has passed. What the workers answer is
    in the attributes.

    Attributes
    ----------
    finished : dict
        By the number of a step: the reports of the workers that have taken it, by rank, each
        (values, what was measured: rows of (name, "run", "send" or "receive", start, stop)).
    error : tuple or None
        What ended the steps that run: the error that a worker raised, or the address of one that is
        lost.
    positions : dict
        Where each worker was when it was stopped, by rank: ((step, instructions executed), [(step,
        number of a value that had arrived), ...]).
    lock : threading.RLock
        Held to read or change several of these together.
    changed : Changes
        Notified at each change.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        workers: Sequence[str],
        names: Mapping[str, Any],
        *,
        kind: str,
        tokens: Sequence[str] = (),
        links: bool = False,
    ) -> None:
        self.workers = list(workers)
        self.finished: dict[int, dict[int, tuple[list[Any], list[Row]]]] = {}
        self.error: BaseException | str | None = None
        self.positions: dict[int, tuple[list[int], list[list[int]]]] = {}
        self.lock = threading.RLock()
        self.changed = Changes()
        self._client = client
        self._name = name
        self._kind = kind
        self._links = links
        self._names = names
        self._comms: list[Comm] = []
        self._locks: list[asyncio.Lock] = []
        self._readers: list[asyncio.Task[None]] = []
        self._epoch = 0
        self._stopped = set(range(len(workers)))  # ranks on which nothing of old epochs runs
        self._accepting = True  # False from a stop until `begin_again`
        self._sent = 0  # steps since then
        self._to_settle = -1  # the last step that all workers have taken, until they know
        self._settle_limit = math.inf  # the last step that they may be told so of
        self._taken = [0] * len(workers)
        self._tasks: dict[int, Future] = {}  # the tasks that take steps, by rank
        self._numbers = itertools.count()  # of these tasks
        self._lost: set[int] = set()
        self._stream = TaskStream(client, self.workers)
        self._background: set[asyncio.Task[None]] = set()
        self._finalizer = weakref.finalize(self, _close, client, self._comms)
        try:
            problem = client_calls.call_with_deadline(
                client, lambda: self._open(tokens), "to connect for programs"
            )
            if problem:
                raise OSError(problem)
        except BaseException:
            self.close()
            raise

    def _named(self, address: str) -> WorkerName:
        return WorkerName(address, self._names.get(address))

    async def _open(self, tokens: Sequence[str]) -> str:
        """Connect to the workers, and have them connect; returns why that failed, or ""."""
        # TLS is a matter of Dask's own connections.
        plain = all(address.startswith("tcp://") for address in self.workers)
        problem = await self._open_channels(tokens, plain) if plain else "not tried"
        if problem and not self._links:
            if plain and self._comms:
                logger.info("training steps send values over Dask's own connections: %s", problem)
                self._name += "-dask"
            await self._close_comms()
            problem = await self._open_channels(tokens, sockets=False)
        if not problem:
            this = weakref.ref(self)
            self._readers += [
                asyncio.create_task(_listen(this, rank, comm))
                for rank, comm in enumerate(self._comms)
            ]
        return problem

    async def _open_channels(self, tokens: Sequence[str], sockets: bool) -> str:
        """As `_open`, with channels over sockets, or over Dask's own connections."""
        seconds = deadline("answer") / _TRIES
        if sockets:
            seconds = min(seconds, _SOCKETS_S)
        comms = self._comms
        try:
            for rank, address in enumerate(self.workers):
                comm = await connect(address, seconds, **self._client.connection_args)
                comms.append(comm)
                self._locks.append(asyncio.Lock())
                about = {
                    "rank": rank,
                    "addresses": self.workers,
                    "sockets": sockets,
                    "groups": device_groups(),
                    "tokens": tokens[rank : rank + 1],
                    "links": self._links,
                }
                hello = {"op": PROGRAM, "name": self._name, "client": self._client.id, **about}
                await comm.write(hello)
            if len(comms) == 1:
                return ""
            where = {}
            if sockets:
                for comm in comms:
                    await comm.write({"op": "listen"})
                where = {"ports": [(await _read(comm))["port"] for comm in comms]}
            for comm in comms:
                await comm.write({"op": "connect", "seconds": seconds, **where})
            for address, comm in zip(self.workers, comms, strict=True):
                problem = (await _read(comm))["error"]
                if problem:
                    return f"{self._named(address)} cannot be connected with the others: {problem}"
        except OSError as error:
            return str(error)
        return ""

    async def _close_comms(self) -> None:
        for comm in self._comms:
            with contextlib.suppress(OSError):
                await comm.write({"op": "close"})
                await comm.close()
        self._comms.clear()
        self._locks.clear()

    def load(
        self, number: int, programs: Sequence[bytes], labels: list[list[tuple[str, str]]]
    ) -> None:
        """Send every worker its program; `labels` has what `StepProgram.labels` gives for each."""
        with self.lock:
            self._stream.label(number, labels)
        self._send([{"op": "load", "number": number, "program": p} for p in programs])

    def unload(self, number: int) -> None:
        """Have the workers drop a program."""
        with self.lock:
            self._stream.unlabel(number)
        self._send([{"op": "unload", "number": number} for _ in self.workers])

    def drop(self, numbers: Sequence[int]) -> None:
        """Have the workers drop inputs that they keep; does not wait. Any thread may call."""
        if internals.loop_runs(self._client):
            loop: Any = self._client.loop
            message = {"op": "drop", "numbers": list(numbers)}
            asyncio.run_coroutine_threadsafe(self._to_all(message), loop.asyncio_loop)

    def packed(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of a step for each worker, serialized; raises what that raises."""
        return [
            message_values.serialized(list(given), comm)
            for given, comm in zip(inputs, self._comms, strict=True)
        ]

    def step(self, number: int, program: int, packed: Sequence[Any]) -> None:
        """Have every worker take a step, each with its `packed` inputs."""
        with self.lock:
            self._sent += 1
            settle = self._settle()
        about = {"op": "step", "number": number, "program": program, "settle": settle}
        self._send([{**about, "inputs": given} for given in packed], with_tasks=True)

    def settle_up_to(self, number: int) -> None:
        """Let the workers drop what takes back steps up to this one, once all have taken them."""
        with self.lock:
            self._settle_limit = number
            step = -1 if self._tasks else self._settle()  # a running task's end says it
        if step >= 0 and self._client.status == "running":
            self._send([{"op": "settle", "step": step} for _ in self.workers])

    def _settle(self) -> int:
        """The step that workers are to be told of as taken by all, -1 for none."""
        if self._to_settle > self._settle_limit:
            return -1
        step, self._to_settle = self._to_settle, -1
        return step

    def rest(self) -> None:
        """No step comes for now: end the tasks that take them."""
        if self._tasks and self._client.status == "running":
            self._send([{"op": "rest"} for _ in self.workers])

    def stop(self) -> None:
        """End the steps that run; `is_stopped` is true when nothing of them runs any more."""
        if self._client.status != "running":
            self.close()
            return
        client_calls.call_with_deadline(self._client, self._stop, "to stop")

    @property
    def is_stopped(self) -> bool:
        """True if nothing of the steps before `stop` runs on any worker."""
        return len(self._stopped | self._lost) == len(self.workers)

    @property
    def lost(self) -> list[str]:
        """The workers to which the connection has ended."""
        return [self.workers[rank] for rank in sorted(self._lost)]

    def task_error(self) -> BaseException | None:
        """The error of a task that was to take steps; None if there is none."""
        failed = next((f for f in list(self._tasks.values()) if f.status == "error"), None)
        return None if failed is None else failed.exception(timeout=deadline("answer"))

    def forget(self, number: int) -> None:
        """Drop what was reported of a step."""
        with self.lock:
            self.finished.pop(number, None)

    def begin_again(self) -> None:
        """After `stop`: go on with new steps."""
        with self.lock:
            self.error = None
            self.finished.clear()
            self._accepting = True
            self._sent = 0
            self._to_settle = -1
            self._taken = [0] * len(self.workers)

    def close(self) -> None:
        """End the programs; their workers close the channels between them."""
        self._finalizer()

    def _send(self, messages: Sequence[dict[str, Any]], *, with_tasks: bool = False) -> None:
        async def write() -> None:
            if with_tasks:
                self._start_tasks()
            await asyncio.gather(
                *(self._write(rank, message) for rank, message in enumerate(messages))
            )

        client_calls.call_with_deadline(self._client, write, "to take a step")

    async def _write(self, rank: int, message: dict[str, Any]) -> None:
        async with self._locks[rank]:
            comm = self._comms[rank]
            given = message.get("inputs")
            large = given is not None and sum(map(len, given.frames)) > _AT_ONCE_MAX
            at_once = contextlib.nullcontext() if large else internals.writing_at_once(comm)
            with contextlib.suppress(OSError), at_once:  # its reader finds that it is gone
                await comm.write(message)

    def _start_tasks(self) -> None:
        """On every worker a task that takes steps, where none does."""
        for rank, address in enumerate(self.workers):
            if rank in self._tasks or rank in self._lost:
                continue
            name = self._names.get(address, address)
            with dask.annotate(  # type: ignore[attr-defined]
                **{ANNOTATION: name}
            ):
                self._tasks[rank] = self._client.submit(
                    run_program,
                    self._name,
                    workers=[address],
                    # Dask would take a task of a key that it knows for one that is done.
                    key=f"{self._kind}-{self._name}-{rank}-{next(self._numbers)}",
                    pure=False,
                )

    def _stop(self) -> Coroutine[Any, Any, None]:
        """Count everything as running; the coroutine has the workers stop."""
        with self.lock:
            self._epoch += 1
            self._accepting = False
            self._stopped.clear()
            self.positions.clear()
        return self._to_all({"op": "stop", "epoch": self._epoch})

    async def _to_all(self, message: dict[str, Any]) -> None:
        ranks = range(len(self.workers))
        await asyncio.gather(*(self._write(rank, dict(message)) for rank in ranks))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the client's event loop, in which this is called."""
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)  # asyncio itself keeps weak references only
        task.add_done_callback(self._background.discard)

    def _heard(self, rank: int, message: dict[str, Any]) -> None:
        """A worker's message; in the client's event loop."""
        with self.lock:
            op = message["op"]
            if op == "done":
                rows = self._stream.add(rank, message["program"], message["timings"])
                found = self.finished.setdefault(message["step"], {})
                found[rank] = message_values.loads(message["reports"]), rows
                if len(found) == len(self.workers):
                    self._to_settle = message["step"]
            elif op == "failed":
                self._fail(remote_errors.loads(message["error"]))
            elif op == "stopped" and message["epoch"] == self._epoch:
                self._stopped.add(rank)
                self.positions[rank] = message["at"], message["arrived"]
                self._tasks.pop(rank, None)
            elif op == "ended":
                self._stream.show()
                self._tasks.pop(rank, None)
                self._taken[rank] += message["taken"]
                settle = self._settle()
                if settle >= 0:  # no step comes that could say it
                    self._start(self._to_all({"op": "settle", "step": settle}))
                if self._accepting and self._taken[rank] < self._sent:
                    self._start_tasks()
            elif op == "peer_lost":
                asyncio.get_running_loop().call_later(1.0, self._peer_lost, message["address"])
            self.changed.notify_all()

    def _peer_lost(self, address: str) -> None:
        """Workers lost their connection to one that the driver may still reach."""
        if self._links and self.error is None:  # what was sent may be lost, and is waited for
            about = {"address": address, "worker": str(self._named(address))}
            self._start(self._to_all({"op": "cut_off", **about}))
        with self.lock:
            if self.error is None:
                self._fail(
                    TaskgradError(
                        "other workers have lost their connection to worker "
                        f"{self._named(address)}, which the driver still "
                        "reaches: look at the network between them"
                    )
                )
            self.changed.notify_all()

    def _fail(self, error: BaseException | str) -> None:
        if self.error is None:
            self.error = error
            self._start(self._stop())  # at once, not when somebody waits
        elif isinstance(error, str) and not isinstance(self.error, str):
            self.error = error  # a lost worker explains others' errors

    def _gone(self, rank: int) -> None:
        with self.lock:
            self._lost.add(rank)
            self._fail(self.workers[rank])
            self.changed.notify_all()


async def _read(comm: Comm) -> Any:
    return await comm.read()


async def _listen(this: weakref.ref[Connections], rank: int, comm: Comm) -> None:
    """Read a worker's messages for as long as the connections are used."""
    while True:
        try:
            message: Any = await comm.read()
        except OSError:
            found = this()
            if found is not None and found._finalizer.alive:
                found._gone(rank)
            return
        found = this()
        if found is None:
            return
        found._heard(rank, message)
        del found, message


def _close(client: Client, comms: Sequence[Comm]) -> None:
    """Close connections, in the client's event loop if that still runs."""

    async def close() -> None:
        for comm in comms:
            with contextlib.suppress(OSError):
                await comm.write({"op": "close"})
                await comm.close()

    if internals.loop_runs(client):
        loop: Any = client.loop
        asyncio.run_coroutine_threadsafe(close(), loop.asyncio_loop)
    else:  # the client is closed
        for comm in comms:
            with contextlib.suppress(Exception):
                comm.abort()
