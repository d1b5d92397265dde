"""`reduce=` of a map: sums of results, leaf by leaf and in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from taskgrad.graph.pytree import describe, flatten

# Dtypes that are too narrow for sums, and the wider ones in which they are summed.
_WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}


class Widened(NamedTuple):
    """A sum in wider dtypes, and for each leaf the dtype to round it to at the end, or None."""

    total: Any
    dtypes: tuple[torch.dtype | None, ...]


def fold(results: Sequence[Any]) -> Any:
    """The sum of results of one structure, or of such sums, from the first to the last.

    As by ``torch.sum``, bools and integers are added up as int64, half precision in float32.
    Raises TypeError if they hold what is neither a tensor nor a number, or differ in structure.
    """
    total, dtypes, structure = _leaves(results[0])
    if structure.has_objects:
        raise TypeError(
            f"reduce= adds up tensors and numbers; a result of this map is or has a "
            f"{structure.name}, and it is not known how to add the rest of that. Return a tuple, a "
            "dict or a dataclass of what is to be added"
        )
    for result in results[1:]:
        leaves, others, other = _leaves(result)
        if other != structure:
            raise TypeError(
                "results of a map are added up only where all have one structure; "
                f"got {describe(results[0])} and {describe(result)}"
            )
        total = [a + b for a, b in zip(total, leaves, strict=True)]
        dtypes = tuple(map(_promoted, dtypes, others))
    found = structure.build(total)
    return Widened(found, dtypes) if any(dtypes) else found


def rounded(total: Any) -> Any:
    """A sum, rounded to the dtypes of the results."""
    if not isinstance(total, Widened):
        return total
    leaves, structure = flatten(total.total)
    pairs = zip(leaves, total.dtypes, strict=True)
    return structure.build([x if dtype is None else x.to(dtype) for x, dtype in pairs])


def mean(total: Any, count: int) -> Any:
    """The mean: a sum divided by the count, then rounded."""
    value, dtypes = total if isinstance(total, Widened) else (total, ())
    leaves, structure = flatten(value)
    divided = structure.build([leaf / count for leaf in leaves])
    return rounded(Widened(divided, dtypes) if dtypes else divided)


def _leaves(result: Any) -> tuple[list[Any], tuple[torch.dtype | None, ...], Any]:
    if isinstance(result, Widened):
        leaves, structure = flatten(result.total)
        return leaves, result.dtypes, structure
    leaves, structure = flatten(result)
    narrow = [x.dtype if isinstance(x, torch.Tensor) else None for x in leaves]
    dtypes = tuple(d if d in _WIDER else None for d in narrow)
    return list(map(_wide, leaves)), dtypes, structure


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        if not leaf.is_floating_point() and not leaf.is_complex():
            return leaf.to(torch.int64)
        return leaf.to(_WIDER.get(leaf.dtype, leaf.dtype))
    if isinstance(leaf, np.generic):
        leaf = leaf.item()
    if not isinstance(leaf, int | float | complex):
        raise TypeError(
            "reduce= adds up tensors and numbers; a result of this map holds a "
            f"{type(leaf).__name__}"
        )
    return int(leaf) if isinstance(leaf, bool) else leaf


def _promoted(a: torch.dtype | None, b: torch.dtype | None) -> torch.dtype | None:
    """The dtype to which the sum of two leaves is rounded; None if it is not."""
    if a is None or b is None or a == b:
        return a if a == b else None
    found = torch.promote_types(a, b)
    return found if found in _WIDER else None
