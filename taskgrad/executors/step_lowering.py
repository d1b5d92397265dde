"""The nodes of a step as one program for each worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from taskgrad.errors import TaskgradError
from taskgrad.executors.lowering import action_of
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Element, Node, label_of, walk
from taskgrad.graph.pullback import Pullback
from taskgrad.plan.program import Operation, Value, programs
from taskgrad.worker.step_program import Job, StepProgram


class NotCompilableError(TaskgradError):
    """A step that the compiled executor does not take; the message says why."""


@dataclass(frozen=True)
class StepNodes:
    """The nodes of a step.

    Attributes
    ----------
    orders
        For each worker its scheduled nodes in their order; what else they need is added.
    names
        The names of scheduled nodes, as a plan prints them.
    targets
        What has to run in addition: the update.
    reports
        The nodes whose values the driver gets.
    ahead
        For each worker a node that it may run, if it has to wait before it needs to.
    """

    orders: Mapping[str, Sequence[Node]]
    names: Mapping[Node, str]
    targets: Sequence[Node]
    reports: Sequence[Node]
    ahead: Mapping[str, Node]


@dataclass(frozen=True)
class LoweredStep:
    """The program of each worker, and which of the step's leaves it takes as inputs, in order.

    `reports` says where each of the values for the driver is: the worker, and the position among
    those that it reports.
    """

    programs: tuple[StepProgram, ...]
    titles: dict[str, str]
    """The titles of operations, for messages."""
    reports: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[Leaf, ...], ...]


def lower_step(step: StepNodes) -> LoweredStep:
    """The programs of a step, whose batch is leaves."""
    workers = list(step.orders)
    rank = {address: i for i, address in enumerate(workers)}
    nodes = _all_of([*step.names, *step.targets, *step.reports])
    placed = {address: _placed(address, step, nodes) for address in workers}
    names = dict(step.names)
    for node in nodes:
        if not isinstance(node, Leaf | Element):
            names.setdefault(node, f"{node.key.partition('-')[0]}.{len(names)}")
    titles = {name: _title(node) for node, name in names.items()}
    inputs: list[dict[Leaf, int]] = [{} for _ in workers]
    jobs: list[dict[str, Job]] = [{} for _ in workers]
    orders: list[list[Operation]] = [[] for _ in workers]
    for address, order in placed.items():
        at = rank[address]
        for node in order:
            sources: list[int | Value] = []
            for given in node.inputs:
                if isinstance(given, Leaf):
                    sources.append(inputs[at].setdefault(given, len(inputs[at])))
                else:
                    sources.append(_value(given, names))
            taken = [s for s in sources if isinstance(s, Value)]
            taken += [_value(n, names) for n in node.awaits if n.worker != address]
            settings = node.settings
            if isinstance(node, Call) and node.tape.wanted and not node.tape.kept:
                settings = settings and settings.without_grad()
            name = names[node]
            label = f"{node.key.partition('-')[0]}-{name}"
            jobs[at][name] = Job(label, action_of(node), settings, tuple(sources))
            orders[at].append(Operation(name, at, tuple(dict.fromkeys(taken))))
    reported: list[list[str]] = [[] for _ in workers]
    reports = []
    for node in step.reports:
        at = rank[node.worker or ""]
        reports.append((at, len(reported[at])))
        reported[at].append(names[node])
    lowered = programs(orders)
    ahead = [
        Job(f"{n.key.partition('-')[0]}-{i}", action_of(n), n.settings, ())
        if (n := step.ahead.get(address)) is not None
        else None
        for i, address in enumerate(workers)
    ]
    sent = [i.value for p in lowered for i in p.instructions if i.kind == "send"]
    numbers = {value: number for number, value in enumerate(dict.fromkeys(sent))}
    return LoweredStep(
        tuple(
            StepProgram(program, jobs[i], numbers, tuple(reported[i]), ahead[i])
            for i, program in enumerate(lowered)
        ),
        titles,
        tuple(reports),
        tuple(tuple(given) for given in inputs),
    )


def _needs(node: Node) -> Iterator[Node]:
    """The operations that must have run before this one."""
    for given in (*node.inputs, *node.awaits):
        if not isinstance(given, Leaf):
            yield given.source if isinstance(given, Element) else given
    if isinstance(node, Pullback):
        yield node.call


def _all_of(targets: Iterable[Node]) -> list[Node]:
    """All operations behind these, oldest first."""
    return sorted(walk(targets, _needs), key=lambda n: n.order)


def _placed(address: str, step: StepNodes, nodes: Sequence[Node]) -> list[Node]:
    """The operations of one worker in order.

    What the schedule does not name runs just before what takes it here; if that is all on other
    workers, as soon as it can; the update at the end.
    """
    mine = [n for n in nodes if n.worker == address]
    scheduled = set(step.orders[address])
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for given in _needs(node):
            users.setdefault(given, []).append(node)
    order: dict[Node, None] = {}

    def place(node: Node) -> None:
        for given in _needs(node):
            if given.worker == address and given not in order and given not in scheduled:
                place(given)
        order[node] = None
        for user in users.get(node, ()):
            eager = user.worker == address and user not in scheduled and user not in order
            if (
                eager
                and all(other.worker != address for other in users.get(user, ()))
                and users.get(user)
                and all(n in order for n in _needs(user) if n.worker == address)
            ):
                place(user)

    for node in step.orders[address]:
        place(node)
    for node in mine:
        if node not in order:
            place(node)
    return list(order)


def _title(node: Node) -> str:
    """The task and its microbatch, without the step."""
    call = node.call if isinstance(node, Pullback) else node
    draw = call.spec.draw if isinstance(call, Call) else None
    return label_of(node.key) + ("" if draw is None else f" in microbatch {draw.microbatch}")


def _value(node: Node, names: Mapping[Node, str]) -> Value:
    if isinstance(node, Element):
        return Value(names[node.source], node.position)
    return Value(names[node])
