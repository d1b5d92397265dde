"""Run an adjoint and leave the parameters' gradients where the parameters live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import CotangentError
from taskgrad.executors.futures import forget, run_with_buffers, values_of
from taskgrad.graph.adjoint import Adjoint
from taskgrad.graph.nodes import Leaf, Node, Shard, ShardCall, new_key
from taskgrad.graph.pytree import Structure, flatten
from taskgrad.worker import shard_ops
from taskgrad.worker.backward import match


def accumulations(adjoint: Adjoint) -> list[ShardCall]:
    """One action a shard: add what this backward gave to the gradients of its parameters."""
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


def run_backward(adjoint: Adjoint, session: Session, *, accumulate: bool) -> dict[Leaf, Any]:
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
        run_with_buffers(targets, session)
        values = values_of(found, session)
    except CotangentError:
        raise  # no tape is used
    except BaseException:
        # What is left of these tapes is of no more use.
        forget(pullback.call for pullback in adjoint.pullbacks)
        raise
    return dict(zip(leaves, values, strict=True))


def remember(node: Node, value: Any) -> None:
    """Note the structure, shapes and dtypes of a value seen on the driver, to check cotangents."""
    leaves, structure = flatten(value)
    shapes = [_shape_of(leaf) for leaf in leaves]
    node.structure = (structure, shapes)


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return leaf


def check_cotangent(node: Node, cotangent: Any) -> None:
    """Raise CotangentError if a cotangent does not fit this node's value, where that is known."""
    if node.structure is None:
        return
    known: tuple[Structure, Sequence[Any]] = node.structure
    structure, leaves = known
    match(cotangent, list(leaves), structure, repr(getattr(node, "title", "the output")))
