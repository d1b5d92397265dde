"""Which layers run again in the backward instead of keeping what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from taskgrad.graph.nodes import Call
from taskgrad.train.step import Recompute
from taskgrad.worker.store import LOSS

Checkpoint = Literal["never", "always", "except_last"] | Callable[[str], bool]


def recompute_rule(checkpoint: Checkpoint) -> Recompute:
    """A rule for every call of a step.

    Raises
    ------
    ValueError
        `checkpoint` is none of what it may be.
    """
    if callable(checkpoint) and not isinstance(checkpoint, type):
        chosen = checkpoint
        return lambda call, m, count: tuple(
            (i, i + 1) for i, (_, name, _) in enumerate(call.steps) if chosen(name)
        )
    if not isinstance(checkpoint, str) or checkpoint not in ("never", "always", "except_last"):
        raise ValueError(
            'checkpoint is "never", "always", "except_last" or a function of a layer\'s name; got '
            f"{checkpoint!r}"
        )

    def whole(call: Call, microbatch: int, microbatches: int) -> tuple[tuple[int, int], ...]:
        layers = sum(index != LOSS for index, _, _ in call.steps)
        kept = checkpoint == "except_last" and microbatch == microbatches - 1
        return () if checkpoint == "never" or kept else ((0, layers),)

    return whole
