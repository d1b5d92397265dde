"""Run an adjoint and leave the parameters' gradients where the parameters live."""

from __future__ import annotations

from typing import Any

from taskgrad.errors import CotangentError
from taskgrad.executors.base import Executor
from taskgrad.graph.adjoint import Adjoint
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import Shard, ShardCall
from taskgrad.worker import shard_ops


def accumulations(adjoint: Adjoint) -> list[ShardCall]:
    """One action a shard: add the gradients of this backward to those of its parameters."""
    by_home: dict[Shard, dict[str, Any]] = {}
    for (home, name), parts in adjoint.parameters.items():
        by_home.setdefault(home, {})[name] = parts
    calls = []
    for home, parameters in by_home.items():
        remote: list[Node] = []
        local: dict[Node, None] = {}
        sources: dict[str, list[str | int]] = {}
        for name, parts in parameters.items():
            sources[name] = []
            for part in parts:
                if part.worker == home.worker:
                    local[part.pullback] = None
                    sources[name].append(part.pullback.key)
                else:
                    sources[name].append(len(remote))
                    remote.append(part)
        key = new_key("accumulate", home.token.partition("-")[0].partition(":")[2])
        after = [*remote, *local]
        calls.append(
            ShardCall(home, shard_ops.accumulate, {"parts": sources}, key=key, after=after)
        )
    return calls


def run_backward(adjoint: Adjoint, executor: Executor, *, accumulate: bool) -> dict[Leaf, Any]:
    """Run all of a backward; returns the gradients of the driver's leaves.

    With `accumulate`, parameters' gradients are added to where the parameters live; without, they
    stay with the pullbacks until `accumulations` is run.
    """
    leaves = [leaf for leaf in adjoint.leaves if isinstance(leaf, Leaf)]
    grads = [adjoint.leaf_grad(leaf) for leaf in leaves]
    found = [g for g in grads if g is not None]
    targets: list[Node] = [*adjoint.pullbacks, *found]
    if accumulate:
        targets += accumulations(adjoint)
    try:
        executor.run(targets)
        values = executor.values(found)
    except CotangentError:
        raise  # no tape is used
    except BaseException:
        # What is left of these tapes cannot be used again.
        executor.forget(pullback.call for pullback in adjoint.pullbacks)
        raise
    return dict(zip(leaves, values, strict=True))
