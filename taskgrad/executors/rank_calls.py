"""Run the ranks of one parallel call, all at once, and give their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskgrad.cluster.session import Session, check_open
from taskgrad.executors.held_parts import hold
from taskgrad.executors.kept_leaves import kept_leaves_of
from taskgrad.executors.rank_groups import groups_of
from taskgrad.executors.rank_links import links_of
from taskgrad.executors.registry import executor_of
from taskgrad.executors.write_back import write_back
from taskgrad.graph.calls import Call
from taskgrad.graph.parts import KeptCall
from taskgrad.graph.pytree import plain


def run_ranks(owner: Session, calls: Sequence[Call]) -> list[Any]:
    """Run these calls, the ranks of one process group; returns their values, in rank order.

    Ranks that leave no tape run in the workers' resident programs; others as Dask tasks. Of a
    `KeptCall` the value is a description, and its output stays as long as the call is there. Raises
    what `Executor.run` and `Executor.values` raise.
    """
    if not any(call.tape.kept for call in calls):
        values = _run_direct(owner, calls)
        if values is not None:
            return values
    return _run_tasks(owner, calls)


def _run_tasks(owner: Session, calls: Sequence[Call]) -> list[Any]:
    links_of(owner).link(owner, calls)
    executor = executor_of(owner)
    executor.run(calls)
    kept_leaves_of(owner).hold(executor)
    return executor.values(calls)


def _run_direct(owner: Session, calls: Sequence[Call]) -> list[Any] | None:
    """The values; None if the workers cannot be reached directly."""
    check_open(owner.client)
    rank = calls[0].spec.rank
    assert rank is not None
    workers = tuple(dict.fromkeys(rank.group.workers))
    with groups_of(owner).group(owner, workers) as group:
        if group is None:
            return None
        if len(calls) > len(workers):
            links_of(owner).link(owner, calls)
        hold(owner, [call for call in calls if isinstance(call, KeptCall)])
        found = group.run(owner, calls)
    write_back([(call, buffers) for call, (_, buffers) in zip(calls, found, strict=True)])
    return [plain(value) for value, _ in found]
