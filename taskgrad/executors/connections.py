"""Driver: connections to programs on some workers, and what these workers said on them."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import dask
from distributed import Client, Future

from taskgrad import remote_errors
from taskgrad.cluster import client_calls
from taskgrad.cluster.changes import Changes
from taskgrad.cluster.config import deadline
from taskgrad.cluster.program_hosts import run_program
from taskgrad.cluster.scheduler_plugin import ANNOTATION
from taskgrad.errors import TaskgradError, TravelError
from taskgrad.executors.program_comms import ProgramComms
from taskgrad.executors.task_stream import Row, TaskStream
from taskgrad.remote_errors import text_of
from taskgrad.worker_names import WorkerName


class Connections:
    """One connection to each of some workers, which run programs: `kind` is what for.

    With `links` they run none: ranks that run as tasks send each other messages over the channels.

    Methods block until the memory of what they send is no longer read, or a deadline has passed.
    What the workers answer is in the attributes.

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
        self._kind = kind
        self._links = links
        self._names = names
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
        hear = weakref.WeakMethod(self._heard)
        self._comms = ProgramComms(client, name, self.workers, hear)
        self._finalizer = weakref.finalize(self, self._comms.close)
        try:
            self._comms.open(tokens, self._named, links=links)
        except BaseException:
            self.close()
            raise

    def _named(self, address: str) -> WorkerName:
        return WorkerName(address, self._names.get(address))

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
        self._send(self._to_each({"op": "unload", "number": number}))

    def drop(self, numbers: Sequence[int]) -> None:
        """Have the workers drop inputs that they keep; does not wait. Any thread may call."""
        self._comms.post(self._to_each({"op": "drop", "numbers": list(numbers)}))

    def packed(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of a step for each worker, serialized; raises what that raises."""
        return self._comms.packed(inputs)

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
            self._send(self._to_each({"op": "settle", "step": step}))

    def _settle(self) -> int:
        """The step that workers are to be told of as taken by all, -1 for none."""
        if self._to_settle > self._settle_limit:
            return -1
        step, self._to_settle = self._to_settle, -1
        return step

    def rest(self) -> None:
        """No step comes for now: end the tasks that take them."""
        if self._tasks and self._client.status == "running":
            self._send(self._to_each({"op": "rest"}))

    def stop(self) -> None:
        """End the steps that run; `is_stopped` is true when nothing of them runs any more."""
        if self._client.status != "running":
            self.close()
            return
        self._comms.send(self._stopping(), "to stop")

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
        async def start() -> None:
            self._start_tasks()

        what = "to take a step"
        if with_tasks and len(self._tasks) < len(self.workers):
            client_calls.call_with_deadline(self._client, start, what)
        self._comms.send(messages, what)

    def _to_each(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        return [dict(message) for _ in self.workers]

    def _start_tasks(self) -> None:
        """On every worker a task that takes steps, where none does; in the event loop."""
        for rank, address in enumerate(self.workers):
            if rank in self._tasks or rank in self._lost:
                continue
            name = self._names.get(address, address)
            with dask.annotate(  # type: ignore[attr-defined]
                **{ANNOTATION: name}
            ):
                self._tasks[rank] = self._client.submit(
                    run_program,
                    self._comms.name,
                    workers=[address],
                    # Dask would take a task of a key that it knows for one that is done.
                    key=f"{self._kind}-{self._comms.name}-{rank}-{next(self._numbers)}",
                    pure=False,
                )

    def _stopping(self) -> list[dict[str, Any]]:
        """Count everything as running; the messages that have the workers stop."""
        with self.lock:
            self._epoch += 1
            self._accepting = False
            self._stopped.clear()
            self.positions.clear()
            return self._to_each({"op": "stop", "epoch": self._epoch})

    def _heard(self, rank: int, message: dict[str, Any]) -> None:
        """A worker's message; in any thread."""
        with self.lock:
            op = message["op"]
            if op == "done":
                rows = self._stream.add(rank, message["program"], message["timings"])
                found = self.finished.setdefault(message["step"], {})
                found[rank] = message["reports"], rows
                if len(found) < len(self.workers):
                    return  # nobody waits for a part of them
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
                    self._comms.post(self._to_each({"op": "settle", "step": settle}))
                if self._accepting and self._taken[rank] < self._sent:
                    self._comms.in_loop(self._start_tasks)
            elif op == "peer_lost":
                self._comms.in_loop(partial(self._peer_lost, message["address"]), 1.0)
            elif op == "unreadable":
                name, cause = self._named(self.workers[rank]), message["error"]
                error = TravelError(
                    f"what worker {name} returned cannot be unpickled here ({text_of(cause)}): its "
                    "class has to be importable here, and to unpickle without an error"
                )
                error.__cause__ = cause
                self._fail(error)
            elif op == "gone":
                self._lost.add(rank)
                self._fail(self.workers[rank])
            self.changed.notify_all()

    def _peer_lost(self, address: str) -> None:
        """Workers lost their connection to one that the driver may still reach."""
        if self._links and self.error is None:  # what was sent may be lost, and is waited for
            about = {"address": address, "worker": str(self._named(address))}
            self._comms.post(self._to_each({"op": "cut_off", **about}))
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
            self._comms.post(self._stopping())  # at once, not when somebody waits
        elif isinstance(error, str) and not isinstance(self.error, str):
            self.error = error  # a lost worker explains others' errors
