"""A resident program: a worker's part of training steps, taken one after the other.

The driver sends the program once and then, for each step, its number and inputs. The thread of one
Dask task runs step after step, and ends when there are none, or when the driver stops it. Values
come from the other workers' programs; whatever receives them calls `deliver`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from taskgrad.errors import WorkerLostError
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.plan.program import Value
from taskgrad.worker import optimizing
from taskgrad.worker.devices import on_host, results_stay
from taskgrad.worker.failures import receive_errors
from taskgrad.worker.rank_forward import RANKS
from taskgrad.worker.step_program import StepProgram, at_step, keys_of, ranks_of
from taskgrad.worker.store import Store

# How long a program waits for another step before its task ends.
_IDLE_S = 0.25
# How long a thread of the process that runs Python code may keep a program from doing so. Python's
# own 5 ms, spent by the event loop while it reads a step's inputs, would stall every other worker.
_SWITCH_S = 0.0005
# How long a program waits before it puts torch's settings back: as long as a short layer computes.
_BRIEF_S = 0.002
# How often a wait checks whether other tasks wait for its thread, if nothing wakes it.
_CHECK_S = 0.5


class Host(Protocol):
    """What a resident program needs of the worker around it. No method blocks for long."""

    def begin(self) -> None:
        """A task begins to take steps."""

    def end(self) -> None:
        """The task has ended."""

    def execute(self, action: Any, settings: TorchSettings | None, inputs: list[Any]) -> Any:
        """Run an action on the worker's store, as its task would."""

    def release(self) -> None:
        """Put torch's settings back, which `execute` leaves for the next action."""

    def send(self, peer: int, tag: Tag, value: Any) -> None:
        """Send a value to another worker's program."""

    def unpack(self, arrived: Any) -> Any:
        """The value of what was delivered."""

    def forget(self, epoch: int) -> None:
        """Nobody waits any more for what was sent in earlier epochs."""

    def wait(self, seconds: float) -> None:
        """Wait until a value has come, or `wake` was called since the last time, or so long."""

    def wake(self) -> None:
        """End the program's wait; any thread may call."""

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the driver."""

    def is_wanted(self) -> bool:
        """True if other tasks wait for the thread of this one."""

    def give_thread_back(self) -> None:
        """Let the worker start another task in place of this one, which goes on."""


Tag = tuple[int, int, int]
"""(epoch, step, number of a value in the step's programs): what a message between them is about."""


@dataclass(frozen=True)
class StepInputs:
    """One step as the driver sends it; `program` is the number of the loaded program to run."""

    number: int
    program: int
    inputs: Sequence[Any]


class Stopped(BaseException):
    """Ends a program's task between two instructions. Not an Exception: no layer shall catch it."""


@dataclass
class Resident:
    """The programs of one trainer on one worker, and the steps that they are to take.

    An epoch ends whenever the driver stops the steps that run: values and steps of earlier epochs
    are dropped.
    """

    store: Store
    host: Host
    tokens: Sequence[str]  # of the shards that steps update
    epoch: int = 0
    _programs: dict[int, tuple[StepProgram, list[list[Value]]]] = field(default_factory=dict)
    _steps: deque[StepInputs] = field(default_factory=deque)
    _arrived: dict[Tag, Any] = field(default_factory=dict)
    _running: bool = False
    _stopping: bool = False
    _closed: bool = False
    _to_settle: int = -1
    _rests: bool = False
    _at: tuple[int, int] = (-1, 0)  # step, and how many of its instructions were executed
    _position: dict[str, Any] = field(default_factory=dict)  # at the last stop
    _taken: StepInputs | None = None  # the step that runs
    _ranks: list[str] = field(default_factory=list)  # the keys of its ranks of process groups
    # Held to read or change several of these together; `Host.wake` tells the program of a change.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, number: int) -> bool:
        """All workers have made this step: have the program drop what could take it back.

        False if no program runs; then `settle_now` is to be called, or the next step does it.
        """
        with self._lock:
            self._to_settle = number
            running = self._running
        self.host.wake()
        return running

    def settle_now(self) -> None:
        """Drop what could take back the step that all workers have made. May wait for a shard."""
        with self._lock:
            number, self._to_settle = self._to_settle, -1
        for token in self.tokens if number >= 0 else ():
            with contextlib.suppress(WorkerLostError):  # the chain has gone
                optimizing.settle(self.store, token, number=number)

    def load(self, number: int, program: StepProgram) -> None:
        """Keep a program for later steps."""
        self._programs[number] = program, program.drops()

    def unload(self, number: int) -> None:
        """No more steps of this program come."""
        self._programs.pop(number, None)

    def add(self, step: StepInputs) -> None:
        """Take one more step, once those before it are done."""
        with self._lock:
            if not self._stopping:
                self._rests = False
                self._steps.append(step)
            if self._closed:
                self._drop_steps()
        self.host.wake()

    def rest(self) -> None:
        """No step comes for now: end the task at once when there is none left."""
        self._rests = True
        self.host.wake()

    def deliver(self, tag: Tag, arrived: Any) -> None:
        """A value came from another worker; `Host.unpack` makes it."""
        with self._lock:
            if tag[0] >= self.epoch:
                self._arrived[tag] = arrived

    def stop(self, epoch: int) -> None:
        """End the steps of earlier epochs, as soon as the instruction that runs has ended.

        The driver is told when nothing of them runs any more.
        """
        with self._lock:
            self._stopping = True
            self._drop_steps()
            self._position = {
                "at": list(self._at),
                "arrived": [[step, number] for _, step, number in self._arrived],
            }
            self.epoch = epoch
            self._arrived = {tag: v for tag, v in self._arrived.items() if tag[0] >= epoch}
            if not self._running:
                self._stopped()
        self.host.wake()

    def close(self) -> None:
        """The driver has gone, or needs no more steps."""
        with self._lock:
            self._closed = True
            self._drop_steps()
            self._arrived.clear()
        self.host.wake()

    def _drop_steps(self) -> None:
        """Take no more steps; ranks of parallel calls fail at their next collective."""
        ended = [*self._steps] if self._taken is None else [self._taken, *self._steps]
        self._steps.clear()
        ranks = [key for step in ended for key in self._rank_keys(step)] + self._ranks
        if ranks:
            self.store.release(ranks)

    def _rank_keys(self, step: StepInputs) -> list[str]:
        found = self._programs.get(step.program)  # None if it could not be unpickled
        jobs = () if found is None else found[0].jobs.values()
        ranks = [job.action for job in jobs if isinstance(job.action, RANKS)]
        return [key for rank in ranks for key in rank.keys(step.inputs)]

    @property
    def call(self) -> tuple[int, int]:
        """The epoch and the number of the step that runs: the same on all workers."""
        return self.epoch, self._at[0]

    @property
    def is_running(self) -> bool:
        """True while a task runs its steps."""
        return self._running

    def run(self) -> int:
        """Take steps until there are none; returns how many were taken. A task calls this."""
        taken = 0
        with self._lock:
            if self._running:  # Dask runs the task again
                return 0
            self._running = True
            self._rests = self._rests and bool(self._steps)  # else a step is on its way
        self.host.begin()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, _SWITCH_S))
        try:
            with results_stay():
                while (step := self._next()) is not None:
                    if not self._take(step):
                        break
                    taken += 1
        except Stopped:
            pass
        finally:
            sys.setswitchinterval(interval)
            self.host.end()
            with self._lock:
                self._running = False
                if self._stopping:
                    self._stopped()
                else:
                    self.host.tell({"op": "ended", "taken": taken})
            self.settle_now()
        return taken

    def _stopped(self) -> None:
        self._stopping = False
        self.host.forget(self.epoch)
        self.host.tell({"op": "stopped", "epoch": self.epoch, **self._position})

    def _next(self) -> StepInputs | None:
        """The next step; None if there is none for a while, or another task waits meanwhile."""
        until = time.monotonic() + _IDLE_S
        while True:
            self._check()
            if self._to_settle >= 0:
                self.settle_now()
            if self._steps:
                break
            left = until - time.monotonic()
            if left <= 0 or self._rests or self.host.is_wanted():
                return None
            self.host.wait(min(left, _CHECK_S))
        if self.host.is_wanted():
            self.host.give_thread_back()
        with self._lock:
            self._check()
            self._taken = self._steps.popleft()
            return self._taken

    def _check(self) -> None:
        if self._stopping or self._closed:
            raise Stopped

    def _take(self, step: StepInputs) -> bool:
        """Run one step and tell the driver; False if it failed."""
        program, drops = self._programs[step.program]
        number, epoch = step.number, self.epoch
        actions = {n: at_step(job.action, number, epoch) for n, job in program.jobs.items()}
        self._ranks = ranks_of(actions.values())  # before it is checked whether this is to stop
        timings = array("d")
        try:
            reports = self._execute(program, drops, step, actions, timings)
            about = {"step": step.number, "program": step.program}
            timed = timings.tobytes()
            self.host.tell({"op": "done", **about, "reports": reports, "timings": timed})
            return True
        except Stopped:
            raise
        except BaseException as error:
            self._check()  # ranks that are stopped raise
            self.host.tell({"op": "failed", "step": step.number, "error": error})
            return False
        finally:
            self._taken = None
            self._ranks = []
            self.host.release()
            self.store.discard(keys_of(list(actions.values())))

    def _execute(
        self,
        program: StepProgram,
        drops: list[list[Value]],
        step: StepInputs,
        actions: dict[str, Any],
        timings: array[float],
    ) -> list[Any]:
        """Execute the instructions of a step; returns the values that the driver gets.

        Appends to `timings` of each instruction its number, when it began, and when it ended, in
        seconds since the epoch.
        """
        values: dict[Value, Any] = {}
        epoch, ahead = self.epoch, program.ahead
        execute, now = self.host.execute, time.time
        for i, (kind, value, peer) in enumerate(program.program.instructions):
            self._at = step.number, i
            self._check()
            if self._to_settle >= 0:
                self.settle_now()
            if kind == "run":
                job = program.jobs[value.operation]
                inputs = [
                    step.inputs[s] if isinstance(s, int) else _found(values, s) for s in job.sources
                ]
                start = now()
                values[value] = execute(actions[value.operation], job.settings, inputs)
                timings.extend((i, start, now()))
                del inputs
            elif kind == "send":
                tag = epoch, step.number, program.numbers[value]
                start = now()
                self.host.send(peer, tag, _found(values, value))
                timings.extend((i, start, now()))
            else:
                tag = epoch, step.number, program.numbers[value]
                if ahead is not None and not self._is_here(tag):
                    start = now()
                    execute(at_step(ahead.action, step.number, epoch), ahead.settings, [])
                    timings.extend((len(drops), start, now()))
                    ahead = None
                start = now()
                arrived = self._receive(tag)
                with receive_errors(value, step.number, self.store.worker):
                    values[value] = self.host.unpack(arrived)
                del arrived
                timings.extend((i, start, now()))
            for name in drops[i]:
                values.pop(name, None)
        self._at = step.number + 1, 0
        return [on_host(values[Value(name)]) for name in program.reports]

    def _is_here(self, tag: Tag) -> bool:
        """True if this value has come."""
        if tag not in self._arrived:
            self.host.wait(0.0)
        return tag in self._arrived

    def _receive(self, tag: Tag) -> Any:
        if not self._is_here(tag):
            self.host.wait(_BRIEF_S)
        if tag not in self._arrived:
            self.host.release()
        while tag not in self._arrived:
            self._check()
            if self.host.is_wanted():
                self.host.give_thread_back()
            else:
                self.host.wait(_CHECK_S)
        with self._lock:
            self._check()  # a stop drops what has arrived
            return self._arrived.pop(tag)


def _found(values: dict[Value, Any], value: Value) -> Any:
    """A value that was received, or made here; or an element of one that was made here."""
    if value in values or value.position is None:
        return values[value]
    return values[Value(value.operation)][value.position]
