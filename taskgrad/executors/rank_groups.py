"""Groups of workers that run the ranks of parallel calls without a Dask task for each rank.

The driver has a connection to each worker of a group, over which it sends the packed function once.
A call is then one message to each worker and one back. A group runs one call at a time; calls of
several threads run in groups of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Client

from taskgrad.cluster.session import Session, check_open
from taskgrad.cluster.wire.serialize import dumps_whole
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.connections import Connections
from taskgrad.executors.kept_inputs import KeptInputs
from taskgrad.executors.program_wait import wait_for_programs
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import new_key
from taskgrad.plan.program import Instruction, Program, Value
from taskgrad.worker.rank_forward import RankForward
from taskgrad.worker.step_program import Job, StepProgram
from taskgrad.worker_names import WorkerName

logger = logging.getLogger("taskgrad")

_MOST_PROGRAMS = 32  # that the workers of a group keep
_MOST_IDLE = 4  # groups that a client keeps
_RANK = Value("rank")

_Workers = tuple[WorkerName, ...]


class RankGroup:
    """Programs on these workers, one rank each. OSError or TaskgradError if one is not reached."""

    def __init__(self, session: Session, workers: _Workers) -> None:
        self.workers = workers
        addresses = [worker.address for worker in workers]
        name = new_key("ranks").partition("-")[2]
        self._connections = Connections(session.client, name, addresses, session.names, kind="pmap")
        self._kept = KeptInputs(self._connections.drop)
        self._programs: OrderedDict[Any, int] = OrderedDict()  # their numbers
        self._numbers = itertools.count()

    def run(self, session: Session, calls: Sequence[Call]) -> list[tuple[Any, Any]]:
        """For each rank the value of its call, and its buffers.

        Raises what a rank raised, or WorkerLostError; the group is then of no more use.
        """
        connections = self._connections
        program = self._load(calls)
        step = next(self._numbers)
        connections.step(step, program, self._inputs(calls))

        def done() -> bool:
            return len(connections.finished.get(step, ())) == len(calls)

        def lost(address: str) -> BaseException:
            rank = connections.workers.index(address)
            return WorkerLostError(
                f"{calls[rank].label} is gone with worker {self.workers[rank]}. Look at that "
                "worker's log (memory?), then call again"
            )

        error = wait_for_programs(session, connections, done, lost, "a rank of a parallel call")
        if error is not None:
            raise error
        reports = connections.finished[step]
        connections.forget(step)
        return [reports[rank][0][0] for rank in range(len(calls))]

    def _load(self, calls: Sequence[Call]) -> int:
        """The number of the program of these calls, which the workers have then."""
        about = tuple((c.spec.function, c.spec.template, c.title, _settings(c)) for c in calls)
        number = self._programs.get(about)
        if number is not None:
            self._programs.move_to_end(about)
            return number
        number = next(self._numbers)
        programs = [_program(rank, call) for rank, call in enumerate(calls)]
        packed = [dumps_whole(program) for program in programs]
        self._connections.load(number, packed, [program.labels() for program in programs])
        self._programs[about] = number
        if len(self._programs) > _MOST_PROGRAMS:
            self._connections.unload(self._programs.popitem(last=False)[1])
        return number

    def _inputs(self, calls: Sequence[Call]) -> list[list[Any]]:
        kept = self._kept.begin()
        found = []
        for rank, call in enumerate(calls):
            given: list[Any] = [call.spec._replace(function=b"", template=b"")]
            for slot, node in enumerate(call.inputs):
                assert isinstance(node, Leaf)
                value = node.sent()
                closed_over = slot in call.spec.tensor_slots
                given.append(kept.given(rank, node.value, value) if closed_over else value)
            found.append(given)
        return found

    @property
    def is_usable(self) -> bool:
        """True if nothing has gone wrong."""
        return self._connections.error is None and not self._connections.lost

    def close(self) -> None:
        """End the programs; ranks that still run fail at their next collective."""
        self._connections.close()


def _settings(call: Call) -> Any:
    settings = call.settings
    return settings and settings.without_grad() if call.tape.wanted else settings


def _program(rank: int, call: Call) -> StepProgram:
    action = RankForward(call.title, call.spec.function, call.spec.template)
    sources = tuple(range(1 + len(call.inputs)))
    label = call.key.rpartition("-")[0] or call.key
    return StepProgram(
        Program(rank, (Instruction("run", _RANK),)),
        {_RANK.operation: Job(label, action, _settings(call), sources)},
        {},
        (_RANK.operation,),
        None,
    )


class RankGroups:
    """The groups of one client that run no call now, and what is known of others."""

    def __init__(self) -> None:
        self._idle: list[RankGroup] = []  # the last used one is last
        self._unreachable: set[_Workers] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def group(self, session: Session, workers: _Workers) -> Iterator[RankGroup | None]:
        """A group of these workers for the block; None if they cannot be reached."""
        found = self._take(workers) or self._make(session, workers)
        try:
            yield found
        except BaseException:
            if found is not None:
                found.close()
            raise
        if found is not None:
            self._put(found)

    def _take(self, workers: _Workers) -> RankGroup | None:
        with self._lock:
            at = [i for i, g in enumerate(self._idle) if g.workers == workers]
            found = self._idle.pop(at[-1]) if at else None
        if found is None or found.is_usable:
            return found
        found.close()
        return None

    def _put(self, group: RankGroup) -> None:
        with self._lock:
            self._idle.append(group)
            old = self._idle.pop(0) if len(self._idle) > _MOST_IDLE else None
        if old is not None:
            old.close()

    def _make(self, session: Session, workers: _Workers) -> RankGroup | None:
        if workers in self._unreachable:
            return None
        try:
            return RankGroup(session, workers)
        except (TaskgradError, OSError) as error:
            check_open(session.client)
            why = error.__cause__ or str(error).partition(". ")[0]
            logger.info("taskgrad runs ranks as Dask tasks: the workers cannot be reached: %s", why)
            self._unreachable.add(workers)
            return None


_groups: WeakKeyDictionary[Client, RankGroups] = WeakKeyDictionary()
_lock = threading.Lock()


def groups_of(session: Session) -> RankGroups:
    """The groups of the session's client."""
    with _lock:
        return _groups.setdefault(session.client, RankGroups())
