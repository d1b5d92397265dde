"""Which layers run again in the backward instead of keeping what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from taskgrad.train.step import Recompute

RecomputeOption = Literal["never", "always", "except_last"] | Callable[[str], bool]


def recompute_rule(checkpoint: RecomputeOption) -> Recompute:
    """A rule for every call of a step.

    Raises
    ------
    ValueError
        `checkpoint` is none of what it may be.
    """
    if callable(checkpoint) and not isinstance(checkpoint, type):
        chosen = checkpoint
        return lambda layers, m, count: tuple(
            (i, i + 1) for i, (_, name, _) in enumerate(layers) if chosen(name)
        )
    if not isinstance(checkpoint, str) or checkpoint not in ("never", "always", "except_last"):
        raise ValueError(
            'checkpoint is "never", "always", "except_last" or a function of a layer\'s name; got '
            f"{checkpoint!r}"
        )

    def whole(
        layers: Sequence[Any], microbatch: int, microbatches: int
    ) -> tuple[tuple[int, int], ...]:
        kept = checkpoint == "except_last" and microbatch == microbatches - 1
        return () if checkpoint == "never" or kept else ((0, len(layers)),)

    return whole
