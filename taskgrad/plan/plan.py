"""Plans of training steps, as frozen, plain data.

A plan joins what the other modules here know apart: the stages of a model and which of them takes
whose output, the worker of each, and for every worker the order of its actions.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from taskgrad.plan.schedule import UPDATE, Action, Pipeline, Schedule
from taskgrad.worker_names import WorkerName


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs as one unit: one forward per microbatch.

    Attributes
    ----------
    title
        Its first and last layer, as tasks show it.
    layers
        The indices of its layers in the model's running order.
    names
        The model's names for these layers.
    worker
        Its worker, an index into the plan's `workers`; in the first replica, if there are several.
    inputs
        The stages whose outputs it takes; empty where it takes the batch.
    trained
        True if it has a backward: it or a stage before it has parameters to train.
    """

    title: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    worker: int
    inputs: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class PlannedWorker:
    """A worker of a plan: the address and the name of its process, the torch device of its layers.

    The name is empty where it has none of its own.
    """

    address: str
    device: str
    name: str = ""

    @property
    def named(self) -> WorkerName:
        """The worker, as it is printed."""
        return WorkerName(self.address, self.name or None)


@dataclass(frozen=True)
class Plan:
    """Stages, placement and schedule of a training step.

    It prints, compares, and goes through JSON unchanged. `Trainer.plan` is the one that is run.

    Attributes
    ----------
    model
        The model's class name.
    stages
        In an order in which they can run.
    workers
        Where they run: of each replica as many, in the same order.
    schedule
        The name of the schedule.
    microbatches
        How many slices a batch is cut into.
    orders
        For every worker its actions, the last of them the update (U); `with_schedule` adds them.
    flush
        True if each worker's update waits until the gradients of all workers are complete, as
        clipping by the norm of all of them needs. Else a worker updates as soon as its own are, and
        goes on with the next step; it keeps what undoes the update until all have made theirs, as
        post-validation in Qi et al. (2023), "Zero Bubble Pipeline Parallelism".
    cost
        The predicted seconds of a step; None if there is no prediction.
    replicas
        How many replicas of the stages there are. They take microbatches in turn.
    idle
        The workers that update nothing, because no parameter that is trained lives there, though
        stages there have a backward.

    Examples
    --------
    >>> from taskgrad.plan.rules import schedule
    >>> stages = Stage("0", (0,), ("0",), 0, ()), Stage("1", (1,), ("1",), 1, (0,))
    >>> workers = PlannedWorker("tcp://10.0.0.7:4040", "cpu", "a"), PlannedWorker("tcp://b", "cpu")
    >>> plan = Plan("Sequential", stages, workers)
    >>> plan = plan.with_schedule(schedule("1f1b", plan.pipeline, 2))
    >>> print(plan)
    Plan of Sequential: 2 stages on 2 workers, 2 microbatches, 1f1b
    stage 0: layers 0, on a (tcp://10.0.0.7:4040), cpu, of the batch
    stage 1: layers 1, on tcp://b, cpu, of stage 0
    a: F0.0 F0.1 BW0.0 BW0.1 U
    tcp://b: F1.0 BW1.0 F1.1 BW1.1 U
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    model: str
    stages: tuple[Stage, ...]
    workers: tuple[PlannedWorker, ...]
    schedule: str = ""
    microbatches: int = 0
    orders: tuple[tuple[Action, ...], ...] = ()
    flush: bool = False
    cost: float | None = None
    replicas: int = 1
    idle: tuple[int, ...] = ()

    @property
    def pipeline(self) -> Pipeline:
        """The stages as a schedule sees them: the worker of each, and those that it takes from."""
        return Pipeline(tuple(s.worker for s in self.stages), tuple(s.inputs for s in self.stages))

    @property
    def waits(self) -> frozenset[int]:
        """The workers whose updates wait for the gradients of all.

        Without a flush those where nothing is trained: that all others have made the step before is
        known to the rest by the cotangents of this one.
        """
        trained = {stage.worker for stage in self.stages if stage.trained}
        size = len(self.workers) // self.replicas
        return frozenset(
            i
            for i in range(len(self.workers))
            if self.flush or i % size not in trained or i in self.idle
        )

    def with_schedule(self, *schedules: Schedule | None) -> Plan:
        """The same stages at the same places, in the order of this schedule.

        Of several replicas each has a schedule for its microbatches, of which the first is that of
        the replica's number, and each next one comes after one of every other; or None, if it has
        no microbatch. A backward that has no action of its own for the weights is written BW; one
        of a stage with nothing to train is left out; every worker ends with U.

        Raises
        ------
        ValueError
            A schedule is of another pipeline, or there is not one for each replica.
        """
        if len(schedules) != self.replicas:
            raise ValueError(f"{len(schedules)} schedules for {self.replicas} replicas")
        given = [schedule for schedule in schedules if schedule is not None]
        for schedule in given:
            if schedule.pipeline != self.pipeline:
                raise ValueError(f"the schedule is of {schedule.pipeline}, not of {self.pipeline}")
        return replace(
            self,
            schedule=given[0].name,
            microbatches=sum(schedule.microbatches for schedule in given),
            orders=tuple(
                order for i, schedule in enumerate(schedules) for order in self._orders(i, schedule)
            ),
            cost=None,
        )

    def _orders(self, replica: int, schedule: Schedule | None) -> list[tuple[Action, ...]]:
        """The order of each worker of a replica, by its schedule."""
        orders = () if schedule is None else schedule.orders
        split = frozenset() if schedule is None else schedule.split

        def planned(action: Action) -> Action:
            whole = action.kind == "B" and action[1:] not in split
            microbatch = replica + self.replicas * action.microbatch
            return action._replace(kind="BW" if whole else action.kind, microbatch=microbatch)

        found = [
            tuple(planned(a) for a in order if a.kind == "F" or self.stages[a.stage].trained)
            for order in orders
        ]
        without = len(self.workers) // self.replicas - len(found)  # workers without a stage
        return [(*order, UPDATE) for order in (*found, *[()] * without)]

    def to_json(self) -> str:
        """The plan as JSON text."""
        orders = [list(map(str, order)) for order in self.orders]
        return json.dumps({**asdict(self), "orders": orders}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises
        ------
        ValueError
            The text is not a plan's.
        """
        try:
            found = json.loads(text)
            stages: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in stage.items()}
                for stage in found["stages"]
            ]
            parts = {
                "stages": tuple(Stage(**stage) for stage in stages),
                "workers": tuple(PlannedWorker(**worker) for worker in found["workers"]),
                "orders": tuple(tuple(map(_action, order)) for order in found["orders"]),
                "idle": tuple(found["idle"]),
            }
            return cls(**{**found, **parts})
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan in JSON: {error!r}") from error

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", {self.cost:.3g} s predicted"
        flush = ", updates after a flush" if self.flush else ""
        replicas = f" in {self.replicas} replicas" if self.replicas > 1 else ""
        lines = [
            f"Plan of {self.model}: {len(self.stages)} stages{replicas} on {len(self.workers)} "
            f"workers, {self.microbatches} microbatches, {self.schedule}{flush}{cost}"
        ]
        for i, stage in enumerate(self.stages):
            size = len(self.workers) // self.replicas
            there = self.workers[stage.worker :: size]
            on = ", ".join(f"{worker.named}, {worker.device}" for worker in there)
            given = ", ".join(f"stage {n}" for n in stage.inputs) or "the batch"
            lines.append(f"stage {i}: layers {stage.title}, on {on}, of {given}")
        lines += [
            f"{worker.named.short}: {' '.join(map(str, order))}"
            for worker, order in zip(self.workers, self.orders, strict=True)
        ]
        return "\n".join(lines)


def _action(text: str) -> Action:
    if text == str(UPDATE):
        return UPDATE
    found = re.fullmatch(r"(F|B|W|BW)(\d+)\.(\d+)", text)
    if found is None:
        raise ValueError(f"this is no action: {text!r}")
    kind: Any = found[1]
    return Action(kind, int(found[2]), int(found[3]))
