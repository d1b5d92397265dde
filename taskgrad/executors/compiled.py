"""Run steps by programs that stay on their workers: Dask starts them and watches, no more.

A program is sent to each worker once. A step is then one small message to each; the workers send
each other what travels, and the driver hears from each when its part is done. Dask's tasks mark
only the time in which a worker takes steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskgrad.cluster.session import Session, check_open
from taskgrad.cluster.wire.serialize import dumps_whole
from taskgrad.errors import WorkerLostError
from taskgrad.executors.connections import Connections
from taskgrad.executors.monitor import worker_lost
from taskgrad.executors.program_wait import wait_for_programs
from taskgrad.executors.step_lowering import LoweredStep
from taskgrad.graph.nodes import new_key
from taskgrad.graph.shards import Shard
from taskgrad.plan.program import Position, unfinished

# How long the error of a lost worker waits for the others to say where they are.
_POSITIONS_S = 0.5
_MOST_NAMED = 4  # operations that this error names


class CompiledExecutor:
    """Takes the steps of one trainer by programs on the workers of these shards.

    TaskgradError if the workers cannot be reached from here, or from each other.
    """

    def __init__(self, session: Session, shards: Sequence[Shard]) -> None:
        self._session = session
        self._shards = shards
        self._lowered: dict[int, LoweredStep] = {}
        self._program_of: dict[int, int] = {}  # by steps that are on their way
        self._connections = Connections(
            session.client,
            new_key("steps").partition("-")[2],
            [shard.worker for shard in shards],
            session.names,
            kind="train",
            tokens=[shard.token for shard in shards],
        )

    def load(self, number: int, lowered: LoweredStep) -> None:
        """Send the workers their programs, which they keep under this number."""
        labels = [p.labels() for p in lowered.programs]
        self._connections.load(number, [dumps_whole(p) for p in lowered.programs], labels)
        self._lowered[number] = lowered

    def submit(self, step: int, program: int, inputs: Sequence[Any]) -> None:
        """Have the workers take a step once those before it are done.

        `inputs` has for each worker the values that its program takes. Raises what sending them
        raises; no worker has got anything then.
        """
        check_open(self._session.client)
        packed = self._connections.packed(inputs)
        self._program_of[step] = program  # first: an interrupt does not tell how much was sent
        self._connections.step(step, program, packed)

    def settle_up_to(self, step: int) -> None:
        """Later steps can be taken back until this names them; without a call none can."""
        self._connections.settle_up_to(step)

    def wait(self, step: int) -> BaseException | None:
        """Wait until all workers have taken a step, or cannot; returns the error, or None."""
        return self._wait(lambda: len(self._reports(step)) == len(self._shards), errors=True)

    def report(self, step: int) -> tuple[list[Any], list[list[Any]]]:
        """What the programs of a step returned, and the timings of each worker; only once."""
        found = self._reports(step)
        lowered = self._lowered[self._program_of[step]]
        values = [found[rank][0][position] for rank, position in lowered.reports]
        self._connections.forget(step)
        self._program_of.pop(step, None)
        return values, [found[rank][1] for rank in sorted(found)]

    def rest(self) -> None:
        """No step comes for now: end the tasks that take them."""
        self._connections.rest()

    def stop(self, seconds: float | None = None) -> bool:
        """End the steps on their way; True once nothing of them runs, and others can be taken.

        False if that takes longer; WorkerLostError or TaskgradError if it cannot come.
        """
        if not self._program_of:
            return True
        self._connections.stop()
        check_open(self._session.client)
        if not self._connections.lost:
            error = self._wait(lambda: self._connections.is_stopped, errors=False, seconds=seconds)
            if isinstance(error, TimeoutError):
                return False
            if error is not None:
                raise error
        if self._connections.lost:
            raise self._lost(self._connections.lost[0])
        self._connections.begin_again()
        self._program_of.clear()
        return True

    def close(self) -> None:
        """End the programs on the workers."""
        self._connections.close()

    def _reports(self, step: int) -> dict[int, Any]:
        return self._connections.finished.get(step, {})

    def _wait(
        self, done: Callable[[], bool], *, errors: bool, seconds: float | None = None
    ) -> BaseException | None:
        return wait_for_programs(
            self._session,
            self._connections,
            done,
            self._lost,
            "a training step",
            errors=errors,
            seconds=seconds,
        )

    def _lost(self, address: str) -> WorkerLostError:
        # The others say where they are when they have stopped.
        connections = self._connections
        connections.changed.wait_for(lambda: connections.is_stopped, _POSITIONS_S)
        with connections.lock:
            labels = self._unfinished(connections.workers.index(address))
        return worker_lost(self._session, address, labels)

    def _unfinished(self, lost: int) -> list[str]:
        """What a lost worker had not finished, for a message."""
        done = {step for step, by in self._connections.finished.items() if lost in by}
        step = min(self._program_of.keys() - done, default=-1)
        if step < 0:
            return []
        lowered = self._lowered[self._program_of[step]]
        programs = [p.program for p in lowered.programs]
        values = {number: value for value, number in lowered.programs[0].numbers.items()}
        others = {
            rank: Position(at[0], at[1], frozenset((s, values[n]) for s, n in arrived if s == step))
            for rank, (at, arrived) in self._connections.positions.items()
            if rank != lost
        }
        found = [lowered.titles[o] for o in unfinished(programs, lost, step, others)]
        if len(found) > _MOST_NAMED:
            return [f"{found[0]} to {found[-1]} of step {step}"]
        return [f"{title} of step {step}" for title in found]
