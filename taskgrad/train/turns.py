"""The microbatches that replicas take at once, a turn, as process groups of their calls."""

from __future__ import annotations

from taskgrad.cluster.config import deadline
from taskgrad.graph.calls import ProcessGroup, Rank
from taskgrad.graph.mesh import Mesh
from taskgrad.graph.nodes import new_key
from taskgrad.plan.plan import Plan

Ranks = dict[tuple[int, int], tuple[Rank, tuple[str, ...]]]
"""By (stage, microbatch): the rank of its call in a group, and the keys of the group's calls."""


def ranks_of(plan: Plan, seed: int) -> Ranks:
    """The ranks of the calls of a step of this plan; a call that is alone in its turn has none.

    Turn k are the microbatches from k times the number of replicas on, one of each replica.
    """
    found: Ranks = {}
    size, seconds = len(plan.workers) // plan.replicas, deadline("collective")
    for first in range(0, plan.microbatches, plan.replicas):
        turn = range(first, min(first + plan.replicas, plan.microbatches))
        if len(turn) == 1:
            continue
        for at, stage in enumerate(plan.stages):
            workers = [plan.workers[i * size + stage.worker].named for i in range(len(turn))]
            title = f"{stage.title} in microbatches {turn[0]} to {turn[-1]}"
            mesh = Mesh((None,), (len(turn),))
            group = ProcessGroup(title, mesh, tuple(workers), seed, seconds)
            keys = tuple([new_key("forward", stage.title) for _ in turn])
            for index, microbatch in enumerate(turn):
                found[at, microbatch] = Rank(group, index), keys
    return found
