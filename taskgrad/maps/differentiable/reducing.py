"""Results of a map added up, leaf by leaf and in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.graph.pytree import describe, flatten


def fold(results: Sequence[Any]) -> Any:
    """The sum of results of one structure, from the first to the last, as ``sum`` adds them.

    Raises
    ------
    TypeError
        They hold something that is neither a tensor nor a number, or differ in structure.
    """
    total, structure = flatten(results[0])
    for result in results[1:]:
        leaves, other = flatten(result)
        if other != structure:
            raise TypeError(
                "results of a map are added up only where all have one structure; "
                f"got {describe(results[0])} and {describe(result)}"
            )
        total = [a + b for a, b in zip(total, leaves, strict=True)]
    for leaf in total:
        if not isinstance(leaf, torch.Tensor | int | float | complex):
            raise TypeError(
                "reduce= adds up tensors and numbers; a result of this map holds a "
                f"{type(leaf).__name__}"
            )
    return structure.build(total)


def mean(total: Any, count: int) -> Any:
    """A sum of so many, divided."""
    leaves, structure = flatten(total)
    return structure.build([leaf / count for leaf in leaves])
