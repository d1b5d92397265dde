"""The schedules that have a name, each a rule of a few lines with its drawing and its paper.

To add one, write a function here that returns a `Rule` and put it into `_RULES`; nothing else
knows the names. In the drawings each line is a worker and each column a unit of time, in which F,
B and W take one each; B without W takes two, as it then is for inputs and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from taskgrad.plan.ordering import Rule, carry_out, oldest_first
from taskgrad.plan.schedule import Action, Costs, Pipeline, Schedule


def gpipe(pipeline: Pipeline, microbatches: int) -> Rule:
    """All microbatches forward, then all backward: simple, with a tape for each of them.

    Tapes: a worker holds one for each of its stages and microbatches. Bubble on a line of p
    workers with m microbatches: (p - 1) / (m + p - 1).

    GPipe (Huang et al., 2019, arXiv:1811.06965).

    Examples
    --------
    >>> print(drawing("gpipe", Pipeline.line(3), 4))
    0: F0 F1 F2 F3 .. .. .. .. .. .. B0 -- B1 -- B2 -- B3 --
    1: .. F0 F1 F2 F3 .. .. .. B0 -- B1 -- B2 -- B3 -- .. ..
    2: .. .. F0 F1 F2 F3 B0 -- B1 -- B2 -- B3 -- .. .. .. ..
    """
    return Rule(oldest_first("FB"), flush=True)


def one_f_one_b(pipeline: Pipeline, microbatches: int) -> Rule:
    """One backward as soon as there is one: the bubble of GPipe, with fewer tapes.

    Tapes: stage i of n holds n - i at most. Bubble on a line of p workers: (p - 1) / (m + p - 1).

    1F1B or PipeDream-Flush (Narayanan et al., 2021, arXiv:2006.09503).

    Examples
    --------
    >>> print(drawing("1f1b", Pipeline.line(3), 4))
    0: F0 F1 F2 .. .. .. .. B0 -- F3 B1 -- .. B2 -- .. B3 --
    1: .. F0 F1 .. .. B0 -- F2 B1 -- F3 B2 -- .. B3 -- .. ..
    2: .. .. F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .. .. .. ..
    """
    stages = len(pipeline.workers)
    in_flight = tuple(stages - stage for stage in range(stages))
    return Rule(oldest_first("BF"), in_flight)


def interleaved_1f1b(pipeline: Pipeline, microbatches: int) -> Rule:
    """1F1B with several stages a worker: each is shorter, and so is the time to fill the pipeline.

    Of p workers, worker i has the v stages i, p + i, 2p + i, ... (``stages_per_worker=v`` of a
    `GraphChain`). Microbatches go in groups of p through a worker's first stage, then through its
    second, and so on. Tapes: worker i holds 2(p - i - 1) + (v - 1)p + 1 at most, each of a stage
    that is a v-th of its layers. On another graph or placement the limit is vp where that is more,
    with the v of that worker; with one stage a worker it is 1F1B. Bubble on a line, with m
    microbatches in whole groups: (p - 1) / (vm + p - 1).

    Megatron-LM (Narayanan et al., 2021, arXiv:2104.04473).

    Examples
    --------
    >>> line = Pipeline((0, 1, 0, 1), ((), (0,), (1,), (2,)))
    >>> print(drawing("interleaved_1f1b", line, 2))
    0: F0.0 F0.1 F2.0 F2.1 ..   ..   B2.0 --   ..   B2.1 --   B0.0 --   B0.1 --
    1: ..   F1.0 F1.1 F3.0 B3.0 --   F3.1 B3.1 --   B1.0 --   B1.1 --   ..   ..
    """
    stages_of = [len(stages) for stages in pipeline.stages_of]
    if max(stages_of) == 1:
        return one_f_one_b(pipeline, microbatches)
    p = len(stages_of)
    limits = [2 * (p - i - 1) + (v - 1) * p + 1 for i, v in enumerate(stages_of)]
    if not _is_ring(pipeline):
        limits = [max(limit, v * p) for limit, v in zip(limits, stages_of, strict=True)]

    def key(action: Action) -> tuple[int, ...]:
        kind, stage, microbatch = action
        return "FB".index(kind), microbatch // p, stage if kind == "F" else -stage, microbatch

    return Rule(key, in_flight_on_worker=tuple(limits), in_turn=True)


def _is_ring(pipeline: Pipeline) -> bool:
    """True for stages in a line that go round the workers, any number of times."""
    stages = range(len(pipeline.workers))
    p = len(pipeline.stages_of)
    return len(stages) % p == 0 and pipeline == Pipeline(
        tuple(stage % p for stage in stages), Pipeline.line(len(stages)).needs
    )


def zb_h1(pipeline: Pipeline, microbatches: int) -> Rule:
    """1F1B whose backwards for weights fill the bubble: a third of it is left, at the same memory.

    With d the number of stages on the longest path of the graph and d(i) that from stage i on (on
    a line of p workers p and p - i): at most d(i) microbatches are between F and B at stage i, and
    d between F and W. Tapes: d at most for each stage. Bubble on a line, where F, B and W take as
    long and m is at least p: (p - 1) / (3m + p - 1).

    ZB-H1 of Zero Bubble Pipeline Parallelism (Qi et al., 2023, arXiv:2401.10241).

    Examples
    --------
    >>> print(drawing("zb_h1", Pipeline.line(3), 4))
    0: F0 F1 F2 .. .. B0 W0 F3 B1 W1 B2 W2 B3 W3
    1: .. F0 F1 .. B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    2: .. .. F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    """
    to_end = pipeline.to_end
    return Rule(oldest_first("FBW"), to_end, tapes=(max(to_end),) * len(to_end))


def zb_h2(pipeline: Pipeline, microbatches: int) -> Rule:
    """No bubble, for about twice the tapes: forwards fill what ZB-H1 leaves at the start of a step.

    With d and d(i) as in ZB-H1: at most 2d(i) - 1 microbatches are between F and B at stage i, and
    2d - 1 between F and W. Tapes: 2d - 1 at most for each stage. Bubble on a line, where F, B and W
    take as long and m is at least 2p - 1: none, if the next step needs no flush.

    ZB-H2 of Zero Bubble Pipeline Parallelism (Qi et al., 2023, arXiv:2401.10241).

    Examples
    --------
    >>> print(drawing("zb_h2", Pipeline.line(3), 5))
    0: F0 F1 F2 F3 F4 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4 .. ..
    1: .. F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4 ..
    2: .. .. F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4
    """
    in_flight = tuple(2 * length - 1 for length in pipeline.to_end)
    return Rule(oldest_first("FBW"), in_flight, tapes=(max(in_flight),) * len(in_flight))


def zb_v(pipeline: Pipeline, microbatches: int) -> Rule:
    """No bubble at the memory of 1F1B: two stages a worker, there and back over the workers.

    Of p workers, worker i has the stages i and 2p - 1 - i (``placement="v"`` of a `GraphChain`), so
    worker 0 has the first and the last one. With d(i) the number of stages on the longest path from
    stage i on: at most d(i) microbatches are between F and W there, and a W comes before any B
    while a forward has yet to take the place of its tape. Tapes: the sum of d(i) over a worker's
    stages at most; on a V that is 2p + 1, each of a stage with half of a worker's layers. Bubble on
    a V, where F, B and W take as long and m is at least 2p - 1: none, if the next step needs no
    flush.

    ZB-V of Zero Bubble Pipeline Parallelism (Qi et al., 2023, arXiv:2401.10241), and V-ZB of
    Pipeline Parallelism with Controllable Memory (Qi et al., 2024, arXiv:2405.15362).

    Examples
    --------
    >>> v = Pipeline((0, 1, 1, 0), ((), (0,), (1,), (2,)))
    >>> print(drawing("zb_v", v, 2))
    0: F0.0 F0.1 ..   F3.0 B3.0 W3.0 F3.1 B0.0 B3.1 W0.0 W3.1 B0.1 W0.1
    1: ..   F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 W1.0 W2.0 B2.1 B1.1 W1.1 W2.1
    """
    to_end = pipeline.to_end

    def key(action: Action) -> tuple[int, ...]:
        kind, stage, microbatch = action
        if kind == "F":
            return 0, -stage, microbatch
        makes_room = microbatch + to_end[stage] < microbatches
        return (1 if makes_room else 3) if kind == "W" else 2, stage, microbatch

    return Rule(key, tapes=to_end)


_RULES: dict[str, Callable[[Pipeline, int], Rule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zb_h1": zb_h1,
    "zb_h2": zb_h2,
    "zb_v": zb_v,
}
NAMES = tuple(_RULES)


@lru_cache(maxsize=64)
def schedule(
    name: str, pipeline: Pipeline, microbatches: int, costs: Costs | None = None
) -> Schedule:
    """The schedule of this name, one of `NAMES`.

    With `costs` workers choose among their ready actions at the times that these give; without,
    each of F, B and W takes one unit of time. Limits and preferences are the same. Either may be
    the shorter one: a worker starts what is ready, though what it prefers may come a moment later.
    `fastest` compares them.

    Raises
    ------
    ValueError
        There is no such schedule, there are no microbatches, or stages need each other.

    Examples
    --------
    >>> print(schedule("zb_h1", Pipeline.line(2), 3))
    0: F0.0 F0.1 B0.0 W0.0 F0.2 B0.1 W0.1 B0.2 W0.2
    1: F1.0 B1.0 F1.1 B1.1 W1.0 F1.2 B1.2 W1.1 W1.2
    """
    if name not in _RULES:
        raise ValueError(f"there is no schedule {name!r}; there are {', '.join(map(repr, NAMES))}")
    if microbatches < 1:
        raise ValueError(f"a step has at least one microbatch; got {microbatches}")
    rule = _RULES[name](pipeline, microbatches)
    return Schedule(name, pipeline, microbatches, carry_out(rule, pipeline, microbatches, costs))


def drawing(name: str, pipeline: Pipeline, microbatches: int) -> str:
    """A drawing of this schedule, a column for each of F, B and W: `Timeline.drawing`."""
    costs = Costs.uniform(len(pipeline.workers))
    return schedule(name, pipeline, microbatches).timeline(costs).drawing()


def fastest(
    candidates: Iterable[Schedule], costs: Costs, tapes: Sequence[int], flush: bool = False
) -> Schedule:
    """Of the schedules whose tapes fit, the one with the shortest simulated step.

    Of equals it is the one with the fewest tapes on the worker that holds most, then the first.

    Parameters
    ----------
    candidates
        Schedules of one pipeline.
    costs
        What its actions take.
    tapes
        How many tapes each worker can hold.
    flush
        Compare steps that each wait for the end of the one before: `Timeline.duration`, and not
        `Timeline.period`.

    Raises
    ------
    ValueError
        The tapes of none of them fit.

    Examples
    --------
    >>> line, costs = Pipeline.line(2), Costs.uniform(2)
    >>> candidates = [schedule(name, line, 4) for name in ("1f1b", "zb_h1", "zb_h2")]
    >>> fastest(candidates, costs, tapes=(2, 1)).name
    '1f1b'
    >>> fastest(candidates, costs, tapes=(2, 2)).name
    'zb_h1'
    >>> fastest(candidates, costs, tapes=(4, 4)).name
    'zb_h2'
    """
    found = [(candidate, candidate.peak_tapes()) for candidate in candidates]
    fitting = [
        (candidate, peaks)
        for candidate, peaks in found
        if all(peak <= limit for peak, limit in zip(peaks, tapes, strict=True))
    ]
    if not fitting:
        least = ", ".join(f"{candidate.name} {peaks}" for candidate, peaks in found)
        raise ValueError(f"workers can hold {tuple(tapes)} tapes; schedules need {least or 'more'}")

    def cost(given: tuple[Schedule, tuple[int, ...]]) -> tuple[float, int]:
        timeline = given[0].timeline(costs)
        return timeline.duration if flush else timeline.period, max(given[1])

    return min(fitting, key=cost)[0]
