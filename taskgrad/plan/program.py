"""Programs: what each worker does in a step, one instruction after the other, as plain data.

A schedule orders the actions of each worker; a program adds the values that travel. An operation's
value is sent to every other worker that takes it as soon as it is computed, and is received just
before the first operation there that takes it. So each worker can run its program alone: it waits
only for values.

As in JaxPP (Xhelaj et al., 2024) and torch.distributed.pipelining, whose schedules are lowered to
computations with sends and receives between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Value(NamedTuple):
    """What an operation returns: all of it, or the element at a position of a sequence."""

    operation: str
    position: int | None = None

    def __str__(self) -> str:
        return self.operation if self.position is None else f"{self.operation}[{self.position}]"


@dataclass(frozen=True)
class Operation:
    """One computation on one worker.

    Attributes
    ----------
    name
        Unique in a step.
    worker
        Where it runs, counted from 0.
    takes
        The values that it needs, of operations on any worker.
    """

    name: str
    worker: int
    takes: tuple[Value, ...] = ()


class Instruction(NamedTuple):
    """Run an operation; or send a value to, or receive one from, the worker `peer`."""

    kind: Literal["run", "send", "receive"]
    value: Value
    peer: int = -1

    def __str__(self) -> str:
        if self.kind == "run":
            return self.value.operation
        return f"{'>' if self.kind == 'send' else '<'}{self.peer}:{self.value}"


@dataclass(frozen=True)
class Program:
    """The instructions of one worker, in the order in which it executes them."""

    worker: int
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"{self.worker}: {' '.join(map(str, self.instructions))}"


def programs(orders: Sequence[Sequence[Operation]]) -> tuple[Program, ...]:
    """The program of each worker, whose operations are given in order.

    Examples
    --------
    >>> f = [Operation("F0", 0), Operation("F1", 1, (Value("F0"),))]
    >>> b = [Operation("B1", 1, (Value("F1"),)), Operation("B0", 0, (Value("B1"),))]
    >>> for program in programs([[f[0], b[1]], [f[1], b[0]]]):
    ...     print(program)
    0: F0 >1:F0 <1:B1 B0
    1: <0:F0 F1 B1 >0:B1

    Raises
    ------
    ValueError
        An operation occurs twice, is in the order of another worker, takes a value of an operation
        that does not exist, or can never run: the message names it.
    """
    made_on: dict[str, int] = {}
    for worker, order in enumerate(orders):
        for operation in order:
            if operation.name in made_on:
                raise ValueError(f"operation {operation.name} occurs twice")
            if operation.worker != worker:
                raise ValueError(
                    f"operation {operation.name} of worker {operation.worker} is in the order of "
                    f"worker {worker}"
                )
            made_on[operation.name] = worker
    sends = _sends(orders, made_on)
    found = tuple(
        Program(worker, tuple(_instructions(order, made_on, sends)))
        for worker, order in enumerate(orders)
    )
    check(found)
    return found


def _sends(
    orders: Sequence[Sequence[Operation]], made_on: dict[str, int]
) -> dict[str, list[tuple[Value, int]]]:
    """By operation: its values that others take, each with the worker that does."""
    found: dict[str, dict[tuple[Value, int], None]] = {}
    for name, worker, takes in ((o.name, o.worker, o.takes) for order in orders for o in order):
        for value in takes:
            if value.operation not in made_on:
                raise ValueError(f"operation {name} takes {value}, which nothing makes")
            if made_on[value.operation] != worker:
                found.setdefault(value.operation, {})[value, worker] = None
    return {name: list(sent) for name, sent in found.items()}


def _instructions(
    order: Iterable[Operation],
    made_on: dict[str, int],
    sends: dict[str, list[tuple[Value, int]]],
) -> Iterator[Instruction]:
    received: set[Value] = set()
    for operation in order:
        for value in operation.takes:
            peer = made_on[value.operation]
            if peer != operation.worker and value not in received:
                received.add(value)
                yield Instruction("receive", value, peer)
        yield Instruction("run", Value(operation.name))
        for value, peer in sends.get(operation.name, ()):
            yield Instruction("send", value, peer)


class Position(NamedTuple):
    """Where a worker is: it has executed so many instructions of its program of a step.

    `arrived` are the (step, value) that came from others and that it has not received yet.
    """

    step: int
    executed: int
    arrived: frozenset[tuple[int, Value]] = frozenset()


def unfinished(
    found: Sequence[Program], lost: int, step: int, others: Mapping[int, Position]
) -> list[str]:
    """The operations of which a worker had not finished all, from the positions of others.

    It had executed the instructions up to the last send that reached one of the others; and none
    after the first send that did not, or the first receive of what they have not sent. (A value
    that was lost on its way with the worker counts as not sent.)

    Parameters
    ----------
    found
        The programs of all workers.
    lost
        The worker.
    step
        The step that it was at.
    others
        Positions of other workers.
    """

    def has_executed(worker: int, index: int) -> bool:
        at = others[worker]
        return at.step > step or (at.step == step and at.executed > index)

    def index_of(worker: int, kind: str, value: Value) -> int:
        wanted = kind, value, lost
        return next(i for i, one in enumerate(found[worker].instructions) if tuple(one) == wanted)

    def has_arrived(value: Value, peer: int) -> bool:
        received = has_executed(peer, index_of(peer, "receive", value))
        return received or (step, value) in others[peer].arrived

    instructions = found[lost].instructions
    known = [(i, *one) for i, one in enumerate(instructions) if one.peer in others]
    begin = max(
        (i for i, kind, value, peer in known if kind == "send" and has_arrived(value, peer)),
        default=-1,
    )
    end = min(
        (
            i
            for i, kind, value, peer in known
            if i > begin
            and (kind == "send" or not has_executed(peer, index_of(peer, "send", value)))
        ),
        default=len(instructions),
    )
    return [i.value.operation for i in instructions[begin + 1 : end] if i.kind == "run"]


def check(found: Sequence[Program], buffers: int | None = None) -> tuple[int, ...]:
    """Execute the programs without computing anything.

    Parameters
    ----------
    found
        The programs of all workers.
    buffers
        How many values that were sent to a worker, and that it has not received yet, it can hold.
        A send waits while they are full. None for any number.

    Returns
    -------
    tuple of int
        For each worker the most values that were held so at a time.

    Raises
    ------
    ValueError
        A program never ends, because a value is never sent or, with that many buffers, workers wait
        for each other; or a value is sent that is never received.
    """
    at = [0] * len(found)
    arrived: list[dict[Value, None]] = [{} for _ in found]
    peaks = [0] * len(found)
    moved = True
    while moved:
        moved = False
        for worker, program in enumerate(found):
            while at[worker] < len(program.instructions):
                kind, value, peer = program.instructions[at[worker]]
                if kind == "receive":
                    if value not in arrived[worker]:
                        break
                    del arrived[worker][value]
                elif kind == "send":
                    if buffers is not None and len(arrived[peer]) >= buffers:
                        break
                    arrived[peer][value] = None
                    peaks[peer] = max(peaks[peer], len(arrived[peer]))
                at[worker] += 1
                moved = True
    stuck = [
        f"worker {p.worker} at {p.instructions[i]}"
        for p, i in zip(found, at, strict=True)
        if i < len(p.instructions)
    ]
    if stuck:
        raise ValueError(f"these programs wait for ever: {'; '.join(stuck)}")
    for worker, left in enumerate(arrived):
        if left:
            raise ValueError(f"worker {worker} never receives {next(iter(left))}")
    return tuple(peaks)
