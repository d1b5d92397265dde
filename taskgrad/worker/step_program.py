"""The program of one worker as it is sent there: instructions, and the action of each operation.

It is made for one step and run for many: `at_step` gives an action the keys, the random streams and
the number of another step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from taskgrad.graph.calls import CallSpec, Draw, StepContext
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.plan.program import Program, Value
from taskgrad.worker.actions import OnShard, ReadGradient, TakeGradients
from taskgrad.worker.backward import Backward, WeightBackward
from taskgrad.worker.forward import Forward

T = TypeVar("T")
Reads = TypeVar("Reads", ReadGradient, TakeGradients)

_STEP_NAMES = ("step", "number")
"""What functions on a shard call the number of a step."""


@dataclass(frozen=True)
class StoredResult:
    """An input of a step that is the result of a task, on the worker that takes it."""

    key: str
    worker: str


@dataclass(frozen=True)
class Job:
    """How a worker runs an operation.

    Attributes
    ----------
    label
        Its task's key on the dashboard.
    action
        What runs, made for step 0.
    settings
        The settings of torch that it runs with; None for those that are there.
    sources
        Where its inputs are: the position of an input of the step, or the value of an operation.
    """

    label: str
    action: Any
    settings: TorchSettings | None
    sources: tuple[int | Value, ...]


@dataclass(frozen=True)
class StepProgram:
    """All that one worker needs to run its part of a step.

    Attributes
    ----------
    program
        Its instructions.
    jobs
        By the name of an operation.
    numbers
        The numbers of the values that travel, the same on all workers.
    reports
        The operations whose values the driver gets when the step is done.
    ahead
        What the worker runs when it first has to wait in a step, if it does.
    """

    program: Program
    jobs: dict[str, Job]
    numbers: dict[Value, int]
    reports: tuple[str, ...]
    ahead: Job | None

    def labels(self) -> list[tuple[str, str]]:
        """The name of each instruction and whether it is "run", "send" or "receive".

        Last of all comes what runs ahead.
        """
        found = [
            (self.jobs[value.operation].label if kind == "run" else f"{kind}-{value}", kind)
            for kind, value, _ in self.program.instructions
        ]
        return [*found, (self.ahead.label if self.ahead else "", "run")]

    def drops(self) -> list[list[Value]]:
        """For each instruction the values that no later one takes."""
        last: dict[Value, int] = {}
        for i, (kind, value, _) in enumerate(self.program.instructions):
            last[value] = i
            if kind == "run":
                sources = [s for s in self.jobs[value.operation].sources if isinstance(s, Value)]
                last |= dict.fromkeys(sources, i)
                last |= {Value(s.operation): i for s in sources}
            last[Value(value.operation)] = i
        kept = {Value(name) for name in self.reports}
        found: list[list[Value]] = [[] for _ in self.program.instructions]
        for value, i in last.items():
            if value not in kept:
                found[i].append(value)
        return found


def at_step(action: Any, step: int, epoch: int) -> Any:
    """The same action in another step than the one that it was made for.

    If a step is taken again, in another `epoch`, its keys are others: messages of the first time
    that come late are for ranks that are not there.
    """
    made = _AT_STEP.get(type(action))
    return action if made is None else made(action, step, epoch)


def _forward(action: Forward, step: int, epoch: int) -> Forward:
    call = action.call
    key, context = _key(call.key, step, epoch), call.context
    if context is not None:
        context = StepContext._make((_draw(context.draw, step), *context[1:]))
    if call.peers:
        call = call._replace(peers=tuple([_key(peer, step, epoch) for peer in call.peers]))
    return _changed(action, call=CallSpec._make((key, *call[1:-1], context)))


def _backward(action: Backward, step: int, epoch: int) -> Backward:
    def at(parts: dict[str, list[str | int]]) -> dict[str, list[str | int]]:
        if not any(parts.values()):
            return parts
        return {
            name: [_key(s, step, epoch) if isinstance(s, str) else s for s in sources]
            for name, sources in parts.items()
        }

    return _changed(
        action,
        key=_key(action.key, step, epoch),
        token=_key(action.token, step, epoch),
        draw=_draw(action.draw, step),
        includes=at(action.includes),
        accumulate=at(action.accumulate),
        peers=tuple([_key(peer, step, epoch) for peer in action.peers]),
    )


def _weight_backward(action: WeightBackward, step: int, epoch: int) -> WeightBackward:
    return _changed(action, token=_key(action.token, step, epoch), draw=_draw(action.draw, step))


def _read_gradient(action: Reads, step: int, epoch: int) -> Reads:
    return _changed(action, key=_key(action.key, step, epoch))


def _on_shard(action: OnShard, step: int, epoch: int) -> OnShard:
    arguments = {k: step if k in _STEP_NAMES else v for k, v in action.arguments.items()}
    return _changed(action, arguments=arguments)


_AT_STEP: dict[type, Callable[[Any, int, int], Any]] = {
    Forward: _forward,
    Backward: _backward,
    WeightBackward: _weight_backward,
    ReadGradient: _read_gradient,
    TakeGradients: _read_gradient,
    OnShard: _on_shard,
}


def _changed(action: T, **changes: Any) -> T:
    """As `dataclasses.replace`, several times as fast; a step has many actions."""
    made: T = object.__new__(type(action))
    vars(made).update(vars(action), **changes)
    return made


def _draw(draw: Draw | None, step: int) -> Draw | None:
    return None if draw is None else Draw(draw.seed, step, draw.microbatch)


def keys_of(actions: Sequence[Any]) -> list[str]:
    """The keys under which these actions leave something in a store."""
    forwards = [a.call.key for a in actions if isinstance(a, Forward)]
    return [*forwards, *(a.key for a in actions if isinstance(a, Backward))]


def ranks_of(actions: Collection[Any]) -> list[str]:
    """The keys of those that are ranks of process groups, forward or backward."""
    calls = [a.call for a in actions if isinstance(a, Forward)]
    backwards = [a for a in actions if isinstance(a, Backward)]
    return [c.key for c in calls if c.peers] + [b.key for b in backwards if b.peers]


def _key(key: str, step: int, epoch: int) -> str:
    return f"{key}@{step}.{epoch}"
