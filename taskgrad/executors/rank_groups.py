"""Groups of workers that run the ranks of parallel calls without a Dask task for each rank.

The driver has a connection to each worker of a group, over which it sends the packed function once.
A call is then one message to each worker and one back. A group runs one call at a time; calls of
several threads run in groups of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Client

from taskgrad.cluster.session import Session
from taskgrad.cluster.wire.serialize import dumps_whole
from taskgrad.errors import WorkerLostError
from taskgrad.executors.connections import Connections
from taskgrad.executors.kept_inputs import KeptInputs
from taskgrad.executors.lowering import action_of
from taskgrad.executors.program_wait import wait_for_programs
from taskgrad.executors.reachable import Reachable, Workers
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import new_key
from taskgrad.graph.parts import KeptCall, PartCall, PartView
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.plan.program import Instruction, Program, Value
from taskgrad.worker.parts import PartJob, RunParts
from taskgrad.worker.rank_forward import RankBlock, RankForward
from taskgrad.worker.step_program import Job, StepProgram

_MOST_PROGRAMS = 32  # that the workers of a group keep
_MOST_IDLE = 4  # groups that a client keeps
_RANK = Value("rank")


class RankGroup:
    """Programs on these workers, each for its ranks of a call.

    OSError or TaskgradError if one of the workers is not reached.
    """

    def __init__(self, session: Session, workers: Workers) -> None:
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
        blocks = _blocks(calls, self._connections.workers)

        def lost(at: int) -> str:
            return (
                f"{blocks[at].calls[0].label} is gone with worker {self.workers[at]}. Look at that "
                "worker's log (memory?), then call again"
            )

        program = self._load(
            tuple([block.about for block in blocks]),
            lambda: [_program(at, block) for at, block in enumerate(blocks)],
        )
        results = self._run(session, program, self._inputs(blocks), lost)
        found = {
            call: value
            for block, result in zip(blocks, results, strict=True)
            for call, value in zip(block.calls, block.values(result), strict=True)
        }
        return [found[call] for call in calls]

    def run_parts(self, session: Session, calls: Sequence[PartCall]) -> dict[PartCall, Any]:
        """The values of calls on parts, each of which takes what is on its worker or here.

        Raises as `run`.
        """
        of_worker = [[c for c in calls if c.worker == w] for w in self._connections.workers]

        def lost(at: int) -> str:
            return (
                f"worker {self.workers[at]} is gone, while {calls[0].label} ran. Make the sharded "
                "tensor again, of what is saved or on the driver, and look at that worker's log "
                "(memory?)"
            )

        program = self._load(RunParts, lambda: list(map(_parts_program, range(len(of_worker)))))
        inputs = [[[_part_job(call) for call in own]] for own in of_worker]
        results = self._run(session, program, inputs, lost)
        return {
            call: value
            for own, values in zip(of_worker, results, strict=True)
            for call, value in zip(own, values, strict=True)
        }

    def _run(
        self,
        session: Session,
        program: int,
        inputs: Sequence[Sequence[Any]],
        lost: Callable[[int], str],
    ) -> list[Any]:
        """What a program gives on each worker; `lost` says what went with one."""
        connections = self._connections
        step = next(self._numbers)
        connections.step(step, program, connections.packed(inputs))
        error = wait_for_programs(
            session,
            connections,
            lambda: len(connections.finished.get(step, ())) == len(inputs),
            lambda address: WorkerLostError(lost(connections.workers.index(address))),
            "a rank of a parallel call",
        )
        if error is not None:
            raise error
        reports = connections.finished[step]
        connections.forget(step)
        return [reports[at][0][0] for at in range(len(inputs))]

    def _load(self, about: Any, made: Callable[[], list[StepProgram]]) -> int:
        """The number of the program of what it is `about`, which the workers have then."""
        number = self._programs.get(about)
        if number is not None:
            self._programs.move_to_end(about)
            return number
        number = next(self._numbers)
        programs = made()
        packed = [dumps_whole(program) for program in programs]
        self._connections.load(number, packed, [program.labels() for program in programs])
        self._programs[about] = number
        if len(self._programs) > _MOST_PROGRAMS:
            self._connections.unload(self._programs.popitem(last=False)[1])
        return number

    def _inputs(self, blocks: Sequence[_Block]) -> list[list[Any]]:
        kept = self._kept.begin()
        found = []
        for at, block in enumerate(blocks):
            specs = [call.spec._replace(function=b"", template=b"") for call in block.calls]
            given: list[Any] = [specs[0] if block.alone else specs]
            for node, closed_over in block.leaves.items():
                if isinstance(node, PartView):
                    given.append(node.stored)
                    continue
                value = node.sent()
                given.append(kept.given(at, node.value, value) if closed_over else value)
            found.append(given)
        return found

    @property
    def is_usable(self) -> bool:
        """True if nothing has gone wrong."""
        return self._connections.error is None and not self._connections.lost

    def close(self) -> None:
        """End the programs; ranks that still run fail at their next collective."""
        self._connections.close()


@dataclass(frozen=True)
class _Block:
    """The ranks of a call that are on one worker.

    `leaves` are the inputs of all of them, and whether the function closes over each; `slots` says
    for each rank which of them it takes. They are `alone` if every worker has one rank: then these
    have channels to each other.
    """

    alone: bool
    calls: tuple[Call, ...]
    leaves: dict[Leaf | PartView, bool]
    slots: tuple[tuple[int, ...], ...]

    @property
    def about(self) -> Any:
        """What their program depends on."""
        specs = [
            (c.spec.function, c.spec.template, c.title, _settings(c), type(c)) for c in self.calls
        ]
        return tuple(specs), self.slots, self.alone

    def values(self, result: Any) -> list[Any]:
        """What each rank gave, of what their action gave."""
        return [result] if self.alone else result


def _blocks(calls: Sequence[Call], workers: Sequence[str]) -> list[_Block]:
    found = []
    for worker in workers:
        own = tuple([call for call in calls if call.worker == worker])
        leaves: dict[Leaf | PartView, bool] = {}
        slots = []
        for call in own:
            given = [node for node in call.inputs if isinstance(node, Leaf | PartView)]
            for slot, leaf in enumerate(given):
                leaves.setdefault(leaf, slot in call.spec.tensor_slots)
            slots.append(given)
        at = {leaf: i for i, leaf in enumerate(leaves)}
        places = tuple([tuple([at[leaf] for leaf in given]) for given in slots])
        found.append(_Block(len(calls) == len(workers), own, leaves, places))
    return found


def _settings(call: Call) -> TorchSettings:
    assert call.settings is not None
    return call.settings.without_grad() if call.tape.wanted else call.settings


def _program(at: int, block: _Block) -> StepProgram:
    ranks = [
        RankForward(c.title, c.spec.function, c.spec.template, isinstance(c, KeptCall))
        for c in block.calls
    ]
    first = block.calls[0]
    settings = _settings(first)
    label = f"{first.key.partition('-')[0]}-{at}"
    job = Job(label, ranks[0], settings, tuple(range(1 + len(block.leaves))))
    if not block.alone:
        together = RankBlock(first.title, tuple(ranks), settings, block.slots)
        job = replace(job, action=together, settings=None)
    return _of_one(at, job)


def _parts_program(at: int) -> StepProgram:
    return _of_one(at, Job(f"sharded-{at}", RunParts(), None, (0,)))


def _of_one(at: int, job: Job) -> StepProgram:
    """A program of one action, whose result the driver gets."""
    return StepProgram(
        Program(at, (Instruction("run", _RANK),)),
        {_RANK.operation: job},
        {},
        (_RANK.operation,),
        None,
    )


def _part_job(call: PartCall) -> PartJob:
    leaves = [node for node in call.inputs if isinstance(node, Leaf | PartView)]
    given = [leaf.stored if isinstance(leaf, PartView) else leaf.sent() for leaf in leaves]
    assert call.settings is not None
    return PartJob(action_of(call), call.settings, given)


class RankGroups:
    """The groups of one client that run no call now, and what is known of others."""

    def __init__(self) -> None:
        self._idle: list[RankGroup] = []  # the last used one is last
        self._reachable = Reachable("taskgrad runs ranks as Dask tasks")
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def group(
        self, session: Session, workers: Workers, *, more: bool = False
    ) -> Iterator[RankGroup | None]:
        """A group of these workers for the block; None if they cannot be reached.

        It may be one with `more` workers.
        """
        found = self._take(workers, more) or self._make(session, workers)
        try:
            yield found
        except BaseException:
            if found is not None:
                found.close()
            raise
        if found is not None:
            self._put(found)

    def _take(self, workers: Workers, more: bool) -> RankGroup | None:
        with self._lock:
            at = [
                i
                for i, group in enumerate(self._idle)
                if group.workers == workers or (more and set(workers).issubset(group.workers))
            ]
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

    def _make(self, session: Session, workers: Workers) -> RankGroup | None:
        return self._reachable.connected(session, workers, lambda: RankGroup(session, workers))


_groups: WeakKeyDictionary[Client, RankGroups] = WeakKeyDictionary()
_lock = threading.Lock()


def groups_of(session: Session) -> RankGroups:
    """The groups of the session's client."""
    with _lock:
        return _groups.setdefault(session.client, RankGroups())
