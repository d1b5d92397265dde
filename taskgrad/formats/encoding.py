"""Plain Python values as JSON, with the tensors in them left out for a file of their own.

What a checkpoint holds besides tensors: options of an optimizer, the state of a learning-rate
scheduler. JSON knows fewer types than Python; the others are objects of one key that starts with
"$". Nothing here can run code, as unpickling can.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.errors import CheckpointError


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; its tensors are put into `tensors`, under names that start with `name`.

    Raises CheckpointError if it holds something that is neither a tensor nor plain, and names it.

    Examples
    --------
    >>> encode({"lr": 0.1, "betas": (0.9, 0.999)}, "group", {})
    {'lr': 0.1, 'betas': {'$tuple': [0.9, 0.999]}}
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"$tensor": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if type(value) in (list, tuple):
        parts = [encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if isinstance(value, dict):
        plain = all(isinstance(k, str) and not k.startswith("$") for k in value)
        if plain and not isinstance(value, Counter):
            return {k: encode(v, f"{name}/{k}", tensors) for k, v in value.items()}
        tag = "$counter" if isinstance(value, Counter) else "$items"
        items = [
            [encode(k, name, tensors), encode(v, f"{name}/{k}", tensors)] for k, v in value.items()
        ]
        return {tag: items}
    raise CheckpointError(
        f"{name!r} is a {type(value).__name__}, which a checkpoint cannot hold: it holds tensors, "
        "numbers, strings, and lists, tuples and dicts of them"
    )


def decode(value: Any, tensor: Callable[[str], Any]) -> Any:
    """Inverse of `encode`; ``tensor(name)`` returns the tensor saved under that name."""
    if isinstance(value, list):
        return [decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(tag, inner)] = value.items()
        if tag == "$tensor":
            return tensor(inner)
        if tag == "$float":
            return float(inner)
        if tag == "$tuple":
            return tuple(decode(v, tensor) for v in inner)
        if tag in ("$items", "$counter"):
            items = {decode(k, tensor): decode(v, tensor) for k, v in inner}
            return Counter(items) if tag == "$counter" else items
    return {k: decode(v, tensor) for k, v in value.items()}


def tensors_in(value: Any) -> list[str]:
    """The names of the tensors that `decode` will ask for."""
    found: list[str] = []

    decode(value, found.append)
    return found
