"""Say so, once, if the steps of a trainer do not pay: if fewer workers would be as fast, say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from taskgrad.plan.plan import Plan

logger = logging.getLogger("taskgrad")

# The first steps compile, and find free memory; then so many are looked at.
_SKIPPED, _LOOKED_AT = 3, 10
# A worker has too much if it computes for this share of a step, and does so many times its part.
_MUCH, _TOO_MUCH = 0.6, 1.5
# Below this speedup over one worker steps do not pay; below this one per worker, and above with a
# slow one, they could be faster.
_SPEEDUP, _EFFICIENCY, _BALANCED = 1.1, 0.5, 0.65
# Seconds for which a forward or a backward has to compute to be worth its messages.
_ACTION_S = 1e-3
_SEE = 'See "When not to use it" in docs/training.md.'


def hint(reports: Sequence[Mapping[str, Any]], plan: Plan) -> str | None:
    """What would make steps faster, in a sentence or two; None if they pay, or if it is not known.

    Parameters
    ----------
    reports
        ``loss.report`` of some steps with this plan; of these ``seconds`` and ``busy``.
    plan
        What the steps ran.

    Examples
    --------
    >>> from taskgrad.plan.plan import PlannedWorker
    >>> workers = PlannedWorker("tcp://a", "cpu"), PlannedWorker("tcp://b", "cpu")
    >>> report = {"seconds": 0.084, "busy": {"tcp://a": 0.002, "tcp://b": 0.001}}
    >>> print(hint([report], Plan("Sequential", (), workers, "1f1b", 4)).partition(":")[0])
    The 2 workers computed for 0.003 s together in a step that took 0.084 s
    """
    workers, microbatches = plan.workers, plan.microbatches
    count = len(workers)
    pipelined = count > plan.replicas
    on_cpu = all(worker.device == "cpu" for worker in workers)  # else kernels run behind the clock
    if count < 2 or not on_cpu or not reports:
        return None
    seconds = median(report["seconds"] for report in reports)
    busy = {w: median(report["busy"].get(w.address, 0.0) for report in reports) for w in workers}
    work, slowest = sum(busy.values()), max(workers, key=lambda worker: busy[worker])
    if not work or not seconds:
        return None
    speedup = work / seconds  # over one worker, which would compute all of it
    efficiency = f"The {count} workers computed in {speedup / count:.0%} of a step's time"
    if speedup < _BALANCED * count and busy[slowest] > max(
        _MUCH * seconds, _TOO_MUCH / count * work
    ):
        return (
            f"{efficiency}, as worker {slowest.named} did {busy[slowest] / work:.0%} of its work: "
            f"give that one fewer layers with placement=. {_SEE}"
        )
    good = 2 * count
    worth_it = work / count / (2 * good) >= _ACTION_S  # with so many microbatches
    if (
        worth_it
        and pipelined
        and (
            (microbatches < count and speedup < _SPEEDUP)
            or (microbatches < good and speedup < _EFFICIENCY * count)
        )
    ):
        return (
            f"{efficiency}, as {microbatches} microbatch{'es are' if microbatches > 1 else ' is'} "
            f"few for them: twice to four times as many as workers are a good start. {_SEE}"
        )
    if speedup >= 1:
        return None
    fewer = f"fewer microbatches than {microbatches}, " if microbatches > 1 else ""
    return (
        f"The {count} workers computed for {work:.2g} s together in a step that took {seconds:.2g} "
        f"s: one worker alone would be as fast. Take larger batches, {fewer}or fewer workers if "
        f"the model fits on them. {_SEE}"
    )


class Hints:
    """Logs the hint for a trainer's steps after some of them; `plan` is for a number of slices."""

    def __init__(self, plan: Callable[[int], Plan]) -> None:
        self._plan = plan
        self._seen = 0
        self._reports: dict[int, list[Mapping[str, Any]]] | None = {}  # until the hint is given

    def note(self, report: Mapping[str, Any], microbatches: int) -> None:
        """A step with so many microbatches is done."""
        self._seen += 1
        if self._reports is None or self._seen <= _SKIPPED:
            return
        reports = self._reports.setdefault(microbatches, [])
        reports.append(report)
        if len(reports) < _LOOKED_AT:
            return
        self._reports = None
        found = hint(reports, self._plan(microbatches))
        if found is not None:
            logger.warning("%s", found)
