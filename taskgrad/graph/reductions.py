"""Reductions of a tensor that is in parts: of each part, and of what the parts gave, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SHORT = (torch.float16, torch.bfloat16)
"""Dtypes whose sums are taken in float32, and rounded once."""


def reduced(
    x: torch.Tensor, name: str, dims: tuple[int, ...], keepdim: bool, options: dict[str, Any]
) -> torch.Tensor:
    """One of torch's reductions: "sum", "mean", "amax", "amin", "all", "any" or "norm"."""
    if name == "norm":
        return torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim, **options)
    function: Any = getattr(torch, name)
    result: torch.Tensor = function(x, dim=dims, keepdim=keepdim, **options)
    return result


def partial_of(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The reduction of each part, and its options, for one over the axis of the parts."""
    options = dict(options)
    if dtype in SHORT and name in ("sum", "mean", "norm") and options.get("dtype") is None:
        options["dtype"] = torch.float32
    return ("sum" if name == "mean" else name), options


def combined(
    found: Sequence[torch.Tensor], name: str, count: int, options: dict[str, Any]
) -> torch.Tensor:
    """The reduction of the whole from those of the parts, taken in their order.

    `count` is how many elements are in one element of a mean.
    """
    total, *rest = found
    if name == "norm":
        order = options.get("ord", 2)
        if order != 0 and not (math.isinf(order) and not rest):
            return torch.linalg.vector_norm(torch.stack(list(found)), ord=order, dim=0)
        name = "sum"
    for one in rest:
        match name:
            case "amax":
                total = torch.maximum(total, one)
            case "amin":
                total = torch.minimum(total, one)
            case "all":
                total = total & one
            case "any":
                total = total | one
            case _:
                total = total + one
    return total / count if name == "mean" else total
