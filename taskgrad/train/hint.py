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
# Above these bubbles a hint is given: that of one slow worker, that of too few microbatches.
_UNBALANCED, _EMPTY = 0.4, 0.5
# How much more than the schedule's own bubble says that something else makes workers wait.
_MORE = 0.15
_SEE = 'See "When not to use it" in docs/training.md.'


def hint(reports: Sequence[Mapping[str, Any]], plan: Plan) -> str | None:
    """What would make steps faster, in a sentence or two; None if they pay, or if it is not known.

    Parameters
    ----------
    reports
        ``loss.report`` of some steps with this plan; of these ``seconds``, ``busy`` and ``bubble``.
    plan
        What the steps ran.

    Examples
    --------
    >>> from taskgrad.plan.plan import PlannedWorker
    >>> workers = PlannedWorker("tcp://a", "cpu"), PlannedWorker("tcp://b", "cpu")
    >>> report = {"seconds": 0.084, "busy": {"tcp://a": 0.002, "tcp://b": 0.001}, "bubble": 0.96}
    >>> print(hint([report], Plan("Sequential", (), workers, "1f1b", 4)).partition(":")[0])
    The 2 workers computed for 0.003 s together in a step that took 0.084 s
    """
    workers, microbatches = plan.workers, plan.microbatches
    count = len(workers)
    on_cpu = all(worker.device == "cpu" for worker in workers)  # else kernels run behind the clock
    if count < 2 or not on_cpu or not reports:
        return None
    seconds = median(report["seconds"] for report in reports)
    bubble = median(report["bubble"] for report in reports)
    busy = {w: median(report["busy"].get(w.address, 0.0) for report in reports) for w in workers}
    work, slowest = sum(busy.values()), max(workers, key=lambda worker: busy[worker])
    of_schedule = (count - 1) / (microbatches + count - 1)
    few = (
        f"Workers had nothing to do in {bubble:.0%} of a step: {microbatches} "
        f"microbatch{'es are' if microbatches > 1 else ' is'} few for {count} workers. Twice to "
        f"four times as many as workers are a good start. {_SEE}"
    )
    if bubble > _UNBALANCED and busy[slowest] > max(0.6 * seconds, 1.5 / count * work):
        return (
            f"Worker {slowest.named} did {busy[slowest] / work:.0%} of the work of a step, and "
            f"workers had nothing to do in {bubble:.0%} of it: give that one fewer layers with "
            f"placement=. {_SEE}"
        )
    if work < seconds:
        if microbatches < count and bubble < of_schedule + _MORE:
            return few
        fewer = f"fewer microbatches than {microbatches}, " if microbatches > 1 else ""
        return (
            f"The {count} workers computed for {work:.2g} s together in a step that took "
            f"{seconds:.2g} s: one worker alone would be as fast. Take larger batches, {fewer}or "
            f"fewer workers if the model fits on them. {_SEE}"
        )
    return few if bubble > _EMPTY and microbatches < 2 * count else None


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
