"""Cut the graph of a model's layers into stages, given the worker of each layer. Pure functions.

A stage takes values of the driver and of other stages, and gives those that other stages take; each
goes straight from where it is made to where it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from taskgrad.errors import TaskgradError
from taskgrad.graph.layer_graph import FUNCTION, GraphStep, LayerGraph


@dataclass(frozen=True)
class GraphStage:
    """Steps of a graph that run as one unit on one worker.

    Attributes
    ----------
    worker
        The address.
    steps
        The numbers of its steps, in the order of the graph.
    inputs
        The numbers of the values that it takes, of the driver and of other stages. The last stage
        also takes those of the model's output that others give.
    outputs
        The numbers of the values that other stages take of it. The last stage has none: it gives
        the model's output.
    needs
        The stages that it takes values of, by their places in the order of all.
    """

    worker: str
    steps: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    needs: tuple[int, ...]


def graph_stages(
    graph: LayerGraph,
    worker_of: Sequence[str],
    *,
    starts: Collection[int] = (),
    functions: MutableMapping[str, str] | None = None,
) -> tuple[GraphStage, ...]:
    """The stages of a graph, as few as can be made in one pass, in an order in which they can run.

    A layer and a read of a parameter run on their layer's worker; a function where the newest of
    the values that it takes is made. It runs where a parameter is that it takes if that is larger
    than its other values, and where its first user runs if it takes inputs alone. What depends on
    parameters alone runs in each stage on its worker that takes it. Steps that nothing of the
    output needs are left out.

    Parameters
    ----------
    worker_of
        By the index of a layer its worker.
    starts
        Layers that begin a stage though the step before may be on the same worker.
    functions
        By name the workers of functions where they are known. Those found here are added. So graphs
        of one model with values of other sizes get the same stages.

    Raises
    ------
    TaskgradError
        Steps that have to be together are of layers on several workers, or need what another stage
        makes of their values.

    Examples
    --------
    >>> import torch
    >>> from taskgrad.graph.layer_graph import Value
    >>> from taskgrad.graph.torch_settings import STARTING
    >>> def layer(i, takes, gives):
    ...     return GraphStep(i, str(i), "Linear", None, b"", (takes,), ((0, gives),), STARTING)
    >>> values = [Value(i - 1 if i else None, (2,), torch.float32, i > 0) for i in range(4)]
    >>> steps = layer(0, 0, 1), layer(1, 1, 2), layer(2, 2, 3)
    >>> graph = LayerGraph(tuple(values), 1, steps, b"", (3,))
    >>> [(s.worker, s.steps) for s in graph_stages(graph, ["a", "a", "b"])]
    [('a', (0, 1)), ('b', (2,))]
    """
    groups = _groups(graph)
    live = _live(graph, groups)
    if not live:
        return (GraphStage(worker_of[0], (), graph.output_values, (), ()),)
    workers = _workers(graph, live, groups, worker_of, {} if functions is None else functions)
    stages = _merged(graph, live, groups, workers, starts)
    _check_together(graph, groups, stages)
    return _built(graph, _ordered(stages))


def _groups(graph: LayerGraph) -> dict[int, tuple[int, ...]]:
    """For each step that has to be with others: all of these, itself included."""
    found: dict[int, tuple[int, ...]] = {}
    for group in graph.together:
        members = {*group, *(other for step in group for other in found.get(step, ()))}
        joined = tuple(sorted(members))
        found |= dict.fromkeys(joined, joined)
    return found


def _live(graph: LayerGraph, groups: dict[int, tuple[int, ...]]) -> list[int]:
    """The steps that the output needs, or that have effects, and those together with one."""
    found: set[int] = set()
    stack = [s for v in graph.output_values if (s := graph.values[v].step) is not None]
    stack += graph.effects
    stack += [s for v in graph.kept or () if (s := graph.values[v].step) is not None]
    while stack:
        number = stack.pop()
        if number not in found:
            found.add(number)
            stack += groups.get(number, ())
            made = (graph.values[v].step for v in graph.steps[number].inputs)
            stack += [step for step in made if step is not None]
    return sorted(found)


def _workers(
    graph: LayerGraph,
    live: list[int],
    groups: dict[int, tuple[int, ...]],
    worker_of: Sequence[str],
    functions: MutableMapping[str, str],
) -> dict[int, str]:
    found: dict[int, str] = {}
    constant = _constant(graph, live)
    alive = set(live)

    def of_group(number: int) -> str | None:
        """The worker of the layers that a step has to be with, or else of functions so far."""
        members = [m for m in groups.get(number, ()) if m in alive]
        layers = [graph.steps[m] for m in members if graph.steps[m].layer != FUNCTION]
        placed = dict.fromkeys(worker_of[step.layer] for step in layers)
        if len(placed) > 1:
            raise _torn(layers)
        return next(iter(placed), None) or next((found[m] for m in members if m in found), None)

    for number in live:
        step = graph.steps[number]
        if step.layer != FUNCTION:
            of_group(number)
            found[number] = worker_of[step.layer]
            continue
        worker = of_group(number) or functions.get(step.name)
        made = [
            (graph.values[v], s) for v in step.inputs if (s := graph.values[v].step) is not None
        ]
        if worker is None:
            placed = [(value, s) for value, s in made if s in found]
            own = [(value, s) for value, s in placed if s not in constant]
            held = [(value, s) for value, s in placed if s in constant]
            largest = max(held, key=lambda pair: pair[0].nbytes, default=None)
            if largest and largest[0].nbytes > sum(value.nbytes for value, _ in own):
                worker = found[largest[1]]
            elif placed:
                worker = found[max(s for _, s in own or placed)]
        if worker is not None:
            found[number] = worker
    for number in reversed(live):
        if number not in found:
            users = [u for v in graph.steps[number].given for u in graph.users.get(v, ())]
            user = min((u for u in users if u in found), default=max(found, default=None))
            found[number] = of_group(number) or (worker_of[-1] if user is None else found[user])
    functions.update({graph.steps[n].name: w for n, w in found.items() if _is_function(graph, n)})
    return found


def _is_function(graph: LayerGraph, number: int) -> bool:
    return graph.steps[number].layer == FUNCTION


@dataclass
class _Stage:
    """A stage that is being made; `needs` are the stages that it takes values of."""

    worker: str
    steps: list[int]
    needs: list[_Stage]

    def depends_on(self, other: _Stage) -> bool:
        """True if it takes something of another one, or of one that does."""
        seen: set[int] = set()
        stack = [self]
        while stack:
            stage = stack.pop()
            if stage is other:
                return True
            if id(stage) not in seen:
                seen.add(id(stage))
                stack += stage.needs
        return False


class _Merging:
    """Puts each step into the newest stage of its worker, or into a new one if it has to wait.

    What depends on parameters alone (`constant`) is put into each stage of its worker that takes
    it: there the parameters are at hand.
    """

    def __init__(
        self,
        graph: LayerGraph,
        groups: dict[int, tuple[int, ...]],
        workers: dict[int, str],
        constant: set[int],
        starts: Collection[int],
    ) -> None:
        self.stages: list[_Stage] = []
        self._graph, self._groups, self._workers = graph, groups, workers
        self._constant = constant
        self._starts = starts
        self._stage_of: dict[int, _Stage] = {}  # where others find a step's values
        self._newest: dict[str, _Stage] = {}

    def place(self, number: int) -> _Stage:
        """The stage in which other stages find the values of a step; it is put there if need be."""
        if number in self._stage_of:
            return self._stage_of[number]
        step, worker = self._graph.steps[number], self._workers[number]
        own, sources = self._needs(number)
        stage = next((self._stage_of[m] for m in self._group(number) if m in self._stage_of), None)
        if stage is not None:
            if stage.worker != worker or not _fits(stage, sources):
                raise _torn([self._graph.steps[m] for m in self._group(number)])
        else:
            begins = step.target is None and step.layer in self._starts
            stage = None if begins else self._newest.get(worker)
            if stage is None or not _fits(stage, sources):
                stage = self._newest[worker] = _Stage(worker, [], [])
                self.stages.append(stage)
        stage.steps = sorted({*stage.steps, *own, number})
        stage.needs += [s for s in sources if s is not stage and s not in stage.needs]
        self._stage_of[number] = stage
        return stage

    def _group(self, number: int) -> tuple[int, ...]:
        return self._groups.get(number, ())

    def _needs(self, number: int) -> tuple[list[int], list[_Stage]]:
        """The constant steps to run with a step, and the stages of its other values."""
        own: list[int] = []
        sources: dict[int, _Stage] = {}
        for made in self._givers(number):
            if made in self._constant and self._workers[made] == self._workers[number]:
                further, others = self._needs(made)
                own += [*further, made]
                sources |= {id(stage): stage for stage in others}
            else:
                stage = self.place(made)
                sources[id(stage)] = stage
        return own, list(sources.values())

    def _givers(self, number: int) -> list[int]:
        """The steps whose values a step takes."""
        values = self._graph.values
        return [s for v in self._graph.steps[number].inputs if (s := values[v].step) is not None]


def _fits(stage: _Stage, sources: Sequence[_Stage]) -> bool:
    """True if a stage can take what these give: none of them waits for it."""
    return not any(source is not stage and source.depends_on(stage) for source in sources)


def _merged(
    graph: LayerGraph,
    live: list[int],
    groups: dict[int, tuple[int, ...]],
    workers: dict[int, str],
    starts: Collection[int],
) -> list[_Stage]:
    constant = {n for n in _constant(graph, live) if n not in groups}
    merging = _Merging(graph, groups, workers, constant, starts)
    ends = {graph.values[value].step for value in (*graph.output_values, *(graph.kept or ()))}
    for number in live:
        if number not in constant or number in ends:
            merging.place(number)
    return merging.stages


def _constant(graph: LayerGraph, live: list[int]) -> set[int]:
    """The steps whose values depend on parameters and buffers alone."""
    found: set[int] = set()
    for number in live:
        step = graph.steps[number]
        made = [graph.values[value].step for value in step.inputs]
        is_read = isinstance(step.target, str)
        if is_read or (step.layer == FUNCTION and made and all(s in found for s in made)):
            found.add(number)
    return found


def _torn(steps: Sequence[GraphStep]) -> TaskgradError:
    names = ", ".join(repr(step.name) for step in steps)
    return TaskgradError(
        f"{names} have to be in one stage, because one of them writes in place into a value that "
        "others give or see, and a value that was sent to another worker would not change with it. "
        "Name the part of the model that they are in in keep_together=, or give their layers one "
        "worker with placement="
    )


def _check_together(
    graph: LayerGraph, groups: dict[int, tuple[int, ...]], stages: Sequence[_Stage]
) -> None:
    """Raise TaskgradError if another stage takes a value that is written later in its own stage."""
    stage_of = {number: stage for stage in stages for number in stage.steps}
    for number, stage in stage_of.items():
        if number not in groups:
            continue
        until = max(groups[number])
        for value in graph.steps[number].given:
            for user in graph.users.get(value, ()):
                if user < until and stage_of.get(user, stage) is not stage:
                    raise _torn([*(graph.steps[m] for m in groups[number]), graph.steps[user]])


def _ordered(stages: Sequence[_Stage]) -> list[_Stage]:
    """Each after those that it needs, the one with the newest step last where there is a choice."""
    waiting = {id(stage): 0 for stage in stages}
    for stage in stages:
        for need in stage.needs:
            waiting[id(need)] += 1
    order: list[_Stage] = []
    ends = [stage for stage in stages if not waiting[id(stage)]]
    while ends:
        stage = max(ends, key=lambda s: s.steps[-1])
        ends.remove(stage)
        order.append(stage)
        for need in stage.needs:
            waiting[id(need)] -= 1
            if not waiting[id(need)]:
                ends.append(need)
    return order[::-1]


def _built(graph: LayerGraph, stages: Sequence[_Stage]) -> tuple[GraphStage, ...]:
    place: dict[int, int] = {}
    for i, stage in enumerate(stages):
        for number in stage.steps:
            place.setdefault(number, i)
    last = len(stages) - 1

    def taken(i: int) -> Iterator[int]:
        """The values that a stage takes of others, or of the driver."""
        own = {*stages[i].steps}
        given = [v for number in stages[i].steps for v in graph.steps[number].inputs]
        for value in dict.fromkeys([*given, *(graph.output_values if i == last else ())]):
            step = graph.values[value].step
            if step is None or step not in own:
                yield value

    inputs = [tuple(taken(i)) for i in range(len(stages))]
    outputs: list[dict[int, None]] = [{} for _ in stages]
    needs: list[set[int]] = [set() for _ in stages]
    for value in graph.kept or ():
        step = graph.values[value].step
        if step is not None:
            outputs[place[step]][value] = None
    for i, values in enumerate(inputs):
        for value in values:
            step = graph.values[value].step
            if step is not None:
                outputs[place[step]][value] = None
                needs[i].add(place[step])
    return tuple(
        GraphStage(
            stage.worker,
            tuple(stage.steps),
            inputs[i],
            tuple(sorted(outputs[i])),
            tuple(sorted(needs[i])),
        )
        for i, stage in enumerate(stages)
    )
