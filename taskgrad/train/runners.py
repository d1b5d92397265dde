"""How the steps of a trainer are run: as Dask tasks, or by compiled programs on the workers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError
from taskgrad.executors.compiled import CompiledExecutor
from taskgrad.executors.step_lowering import NotCompilableError, StepNodes, lower_step
from taskgrad.function_layout import constants, structure
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.slices import Slice
from taskgrad.graph.torch_settings import settings_now
from taskgrad.layout import Layout
from taskgrad.train.data import Arguments, Batch
from taskgrad.train.step import Settings, Step, build, calls_of
from taskgrad.worker import training
from taskgrad.worker.step_program import StoredResult

# Dask remembers how to compute again all that a task depended on: steps that wait for each other
# pile up on the scheduler. So after this many the workers are let run dry.
_MAX_CHAINED = 16
# Programs that are kept, here and on the workers. Each shape of a step has its own: number and
# sizes of microbatches, with or without an update.
_MAX_SHAPES = 16


class Runner(Protocol):
    """Runs the steps of one trainer, several of which may be on their way."""

    takes_back: bool
    """True if a step that has ended can be taken back until `settle_up_to` names it."""

    @property
    def must_finish(self) -> bool:
        """True if the steps so far must have ended before the next one is submitted."""

    def settle_up_to(self, step: int) -> None:
        """Steps up to this one need not be taken back once they have ended."""

    def submit(self, batch: Batch, number: int) -> Any:
        """Submit a step; returns what the other methods know it by."""

    def wait(self, running: Any) -> dict[str, Any]:
        """Wait for a step, the first of those on their way; returns its report."""

    def finish(self) -> None:
        """All steps were waited for: release what is held for the next one."""

    def stop(self, seconds: float | None) -> bool:
        """End all steps on their way, and what `submit` had begun to send when it was interrupted.

        True once nothing of them can run any more; False if that takes longer.
        """


class FuturesRunner:
    """Each step is one graph of Dask tasks, submitted at once."""

    takes_back = False

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout = layout
        self._executor = layout.executor
        self._settings = settings
        self._last: Step | None = None  # the next step waits for it on the workers
        self._chained = 0
        self._on_their_way: list[Step] = []

    @property
    def must_finish(self) -> bool:
        """True if no further step may be chained to the last."""
        return self._chained == _MAX_CHAINED

    def settle_up_to(self, step: int) -> None:
        pass  # the last tasks of a step do

    def submit(self, batch: Batch, number: int) -> Step:
        made = build(self._layout, batch, number, self._settings, self._last)
        self._on_their_way.append(made)
        made.launched(self._executor.launch(made.targets, made.order))
        self._last = made
        self._chained += 1
        return made

    def wait(self, running: Step) -> dict[str, Any]:
        error = self._executor.wait(running.targets, launch=running.launch)
        if error is not None:
            raise error
        report: dict[str, Any]
        [report] = self._executor.values([running.reported])
        self._on_their_way.remove(running)
        if running is not self._last:
            self._executor.forget(running.targets)
        return report

    def finish(self) -> None:
        if self._last is not None:
            self._executor.forget(self._last.targets)
            self._last, self._chained = None, 0

    def stop(self, seconds: float | None) -> bool:
        for step in self._on_their_way:
            self._executor.cancel(step.targets)
        self._on_their_way.clear()
        self._last, self._chained = None, 0
        return True  # what takes a step back is a task, too, and runs after those on its shard


class _Running(NamedTuple):
    """A step on its way.

    `held` are the slices of its batch that stay on workers until it is done, `about` the arguments
    of its report.
    """

    number: int
    held: list[Slice]
    about: dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    """A program on the workers.

    `number` is its own there, `takes` are the leaves of a batch that each worker takes, `about` the
    arguments of the step's report.
    """

    number: int
    takes: list[list[int]]
    about: dict[str, Any]


class CompiledRunner:
    """Each step is run by programs that stay on the workers."""

    takes_back = True
    must_finish = False  # each step is a message: nothing piles up

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout = layout
        self._settings = settings
        self._executor: CompiledExecutor | None = None
        self._loaded: OrderedDict[Any, _Loaded] = OrderedDict()
        self._settled: int | None = None

    def settle_up_to(self, step: int) -> None:
        self._settled = step
        if self._executor is not None:
            self._executor.settle_up_to(step)

    def submit(self, batch: Batch, number: int) -> _Running:
        """Submit a step; NotCompilableError if it is to be run as tasks."""
        executor = self._connected()
        self._layout.refuse_modes()
        slices = [n for n in batch.values if isinstance(n, Slice)]
        if slices:
            batch = self._cut(batch, slices)
        leaves = batch.leaves
        calls = None
        if self._layout.is_traced:  # calls may take other values of the driver's each time
            calls = calls_of(self._layout, batch, number, self._settings)
            leaves += constants(calls, leaves)
        loaded = self._program(batch, number, leaves, calls, executor)
        inputs = [[leaves[i].sent() for i in given] for given in loaded.takes]
        for shard, given in zip(self._layout.shards, inputs, strict=True):
            if any(isinstance(v, StoredResult) and v.worker != shard.worker for v in given):
                raise NotCompilableError(
                    "its batch is on workers, and several of them take the model's input"
                )
        executor.submit(number, loaded.number, inputs)
        # A program's shares are those of the batch that it was made for.
        return _Running(number, slices, {**loaded.about, "weights": batch.weights})

    def _connected(self) -> CompiledExecutor:
        if self._executor is None:
            try:
                self._executor = CompiledExecutor(self._layout.session, self._layout.shards)
            except (TaskgradError, OSError) as error:
                check_open(self._layout.session.client)
                why = error.__cause__ or str(error).partition(". ")[0]
                raise NotCompilableError(f"the workers cannot be reached: {why}") from error
            if self._settled is not None:
                self._executor.settle_up_to(self._settled)
        return self._executor

    def _cut(self, batch: Batch, slices: list[Slice]) -> Batch:
        """A batch that is on workers, once it is cut there: with references to the slices."""
        executor = self._layout.executor
        weights = [w for w in batch.weights if isinstance(w, Node)]
        executor.run([*slices, *weights])
        found = executor.values(weights) or batch.weights

        def stored(node: Node) -> Node:
            if not isinstance(node, Slice):
                return node
            return Leaf(StoredResult(node.key, node.worker or ""), needs_grad=False)

        inputs = [
            Arguments(tuple(map(stored, args)), {name: stored(n) for name, n in kwargs.items()})
            for args, kwargs in batch.inputs
        ]
        targets = [stored(node) for node in batch.targets]
        return replace(batch, inputs=inputs, targets=targets, weights=found)

    def _program(
        self,
        batch: Batch,
        number: int,
        leaves: list[Leaf],
        calls: list[list[Call]] | None,
        executor: CompiledExecutor,
    ) -> _Loaded:
        """The program for a batch of this shape."""
        update = (number + 1) % self._settings.accumulate == 0
        traced = None if calls is None else structure(calls, leaves)
        weights = None if batch.scales else tuple(batch.weights)  # scales are sent with each step
        about = batch.count, batch.form, batch.loss_kind
        shape = about, update, weights, settings_now(), traced
        if shape in self._loaded:
            self._loaded.move_to_end(shape)
            return self._loaded[shape]
        made = build(self._layout, batch, number, self._settings, None, calls)
        lowered = lower_step(
            StepNodes(
                {address: list(nodes) for address, nodes in made.executed.items()},
                {node: name for nodes in made.scheduled.values() for node, name in nodes.items()},
                list(made.last.values()),
                made.report.inputs,
                {node.worker or "": node for node in made.ahead},
            )
        )
        free = len(self._loaded)  # the number of a program that is not in use
        if free == _MAX_SHAPES:
            free = self._loaded.popitem(last=False)[1].number
        executor.load(free, lowered)
        position = {leaf: i for i, leaf in enumerate(leaves)}
        takes = [[position[leaf] for leaf in given] for given in lowered.inputs]
        self._loaded[shape] = _Loaded(free, takes, made.report.arguments)
        return self._loaded[shape]

    def wait(self, running: _Running) -> dict[str, Any]:
        assert self._executor is not None
        error = self._executor.wait(running.number)
        if error is not None:
            raise error
        values, timings = self._executor.report(running.number)
        workers = [shard.worker for shard in self._layout.shards]
        spent = [{"run": 0.0, "send": 0.0, "receive": 0.0} for _ in workers]
        lasted = []
        for times, rows in zip(spent, timings, strict=True):
            for _, kind, start, stop in rows:
                times[kind] += stop - start
            lasted.append(max(row[3] for row in rows) - min(row[2] for row in rows))
        return {
            **training.report_of(values, **running.about),
            "step": running.number,
            "bubble": max(0.0, 1 - sum(times["run"] for times in spent) / sum(lasted)),
            "seconds": max(lasted),
            "busy": {w: t["run"] for w, t in zip(workers, spent, strict=True)},
            "waiting": {w: t["receive"] for w, t in zip(workers, spent, strict=True)},
        }

    def finish(self) -> None:
        if self._executor is not None:
            self._executor.rest()

    def stop(self, seconds: float | None) -> bool:
        return self._executor is None or self._executor.stop(seconds)
