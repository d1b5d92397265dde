"""Run the ranks of one parallel call, all at once, and give their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskgrad.cluster.session import Session
from taskgrad.executors.registry import executor_of
from taskgrad.graph.calls import Call


def run_ranks(owner: Session, calls: Sequence[Call]) -> list[Any]:
    """Run these calls, the ranks of one process group; returns their values, in rank order.

    Raises what `Executor.run` and `Executor.values` raise.
    """
    return run_tasks(owner, calls)


def run_tasks(owner: Session, calls: Sequence[Call]) -> list[Any]:
    """As `run_ranks`, each call a task: what reads parts of sharded tensors, or leaves some."""
    executor = executor_of(owner)
    executor.run(calls)
    return executor.values(calls)
