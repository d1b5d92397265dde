"""Arguments of vectorized functions and of their reductions: checks and conversions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from taskgrad.kernels.runtime.memory import unreadable


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """An argument of the function of this name as a dense tensor of the CPU or meta device."""
    if isinstance(value, torch.Tensor):
        if value.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} runs on the CPU; got a tensor on {value.device}: "
                "use x.cpu(), or torch's own operations there"
            )
        if value.layout is not torch.strided or value.is_nested:
            raise unreadable(name, [value])
        return value.resolve_neg()
    if isinstance(value, bool | int | float):
        if not (isinstance(value, float) or -(2**63) <= value < 2**63):
            raise ValueError(f"{name} got {value}, which does not fit into 64 bits: pass a float")
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    raise TypeError(f"{name} takes tensors and numbers; got {type(value).__name__}")


def on_one_device(name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """As torch: with tensors on meta only 0-d tensors may be on another device."""
    if not any(x.is_meta for x in tensors):
        return tensors
    if any(not x.is_meta and x.dim() for x in tensors):
        raise ValueError(f"{name} got tensors on meta and on the CPU: they must be on one device")
    return [x.to("meta") for x in tensors]


def empty_reduced(x: torch.Tensor, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    """An uninitialized tensor for the result of a reduction."""
    sizes = [1 if d in dims else size for d, size in enumerate(x.shape) if keepdim or d not in dims]
    return x.new_empty(sizes)


def is_integer(value: Any) -> bool:
    """True if this can be the index of a dimension."""
    return not isinstance(value, bool) and hasattr(type(value), "__index__")


def dimensions(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dimensions as sorted non-negative indices; raises if one is given twice."""
    if dim is None:
        return tuple(range(rank))
    given: Any = [dim] if is_integer(dim) else dim
    given = list(given) if isinstance(given, Iterable) else [given]
    if not all(map(is_integer, given)):
        raise TypeError(f"dim must be an integer, several, or None; got {dim!r}")
    found = []
    for d in given:
        if not -max(rank, 1) <= d < max(rank, 1):
            raise IndexError(f"dim={d} is out of range for a tensor of {rank} dimensions")
        found.append(d % max(rank, 1))
    if len(set(found)) < len(found):
        raise ValueError(f"dim={dim} names a dimension twice")
    return tuple(sorted(found)) if rank else ()


def signature_of(fn: Callable[..., Any]) -> tuple[int, tuple[Any, ...]]:
    """The number of a function's arguments, and the defaults of the last ones."""
    name = getattr(fn, "__name__", repr(fn))
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError as error:  # implemented in C
        raise TypeError(f"{name} does not say how many arguments it takes: wrap it") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for p in parameters:
        if p.kind not in positional:
            raise TypeError(f"{name}: the arguments must have a fixed number; {p} has not")
    if not parameters:
        raise TypeError(f"{name} takes no arguments, so there is nothing to go over")
    return len(parameters), tuple(p.default for p in parameters if p.default is not p.empty)


def check_derivative(derivative: Any, arity: int) -> None:
    """Raise TypeError if this does not take the function's arguments."""
    if not callable(derivative):
        raise TypeError(f"derivative= must be a function; got {type(derivative).__name__}")
    try:
        signature = inspect.signature(derivative)
    except ValueError:  # implemented in C
        return
    try:
        signature.bind(*[0.0] * arity)
    except TypeError as error:
        raise TypeError(
            f"derivative= must take the function's arguments, of which there are {arity}: {error}"
        ) from error


def check_start(start: Any, dtype: torch.dtype) -> None:
    """Raise TypeError if a result of this dtype cannot hold the start value."""
    if not isinstance(start, bool | int | float):
        raise TypeError(f"start must be a number; got {type(start).__name__}")
    if not torch.can_cast(torch.tensor(start).dtype, dtype):
        raise TypeError(f"start={start!r} does not fit into a result of {dtype}")
