"""Run calls on parts of sharded tensors, side by side, and give their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskgrad.cluster.session import Session, check_open
from taskgrad.executors.held_parts import hold
from taskgrad.executors.rank_groups import groups_of
from taskgrad.executors.registry import executor_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.parts import PartCall, PartView

Values = Callable[[Sequence[PartCall]], list[Any]]
"""Gives the values of calls that have run; of those that stay, their descriptions."""


def run_parts(owner: Session, calls: Sequence[PartCall], *, direct: bool = True) -> Values:
    """Run these calls; what the function that is returned gives may come only then.

    If none of them takes what another worker has, they run in the workers' resident programs;
    otherwise, or if it is not to be `direct`, as Dask tasks. Raises what a call raises, or
    WorkerLostError.
    """
    found = _run_direct(owner, calls) if direct and all(map(_is_local, calls)) else None
    if found is not None:
        values = found
        return lambda asked: [values[call] for call in asked]
    executor = executor_of(owner)
    executor.run(calls)
    return executor.values


def _is_local(call: PartCall) -> bool:
    return call.worker is not None and all(
        isinstance(node, Leaf) or (isinstance(node, PartView) and node.worker == call.worker)
        for node in call.inputs
    )


def _run_direct(owner: Session, calls: Sequence[PartCall]) -> dict[PartCall, Any] | None:
    """The values; None if the workers cannot be reached directly."""
    check_open(owner.client)
    addresses = dict.fromkeys(str(call.worker) for call in calls)
    there = {worker.address for worker in owner.workers_since_change(1)}
    if not addresses or not there.issuperset(addresses):
        return None  # tasks say who is gone
    workers = tuple(map(owner.named, addresses))
    with groups_of(owner).group(owner, workers, more=True) as group:
        if group is None:
            return None
        hold(owner, [call for call in calls if call.stays])
        return group.run_parts(owner, calls)
