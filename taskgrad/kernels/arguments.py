"""Checks of the arguments of vectorized functions and of their reductions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def copied(name: str, result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy a result of torch's own dispatch into ``out=``."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{name}: out= must be a tensor; got {type(out).__name__}")
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise RuntimeError(f"{name}: out= has no gradients; call it without, or in torch.no_grad()")
    if out.shape != result.shape:
        raise ValueError(
            f"out= has the shape {tuple(out.shape)}; the result's is {tuple(result.shape)}"
        )
    if not torch.can_cast(result.dtype, out.dtype):
        raise TypeError(f"out= is {out.dtype}, which a result of {result.dtype} does not fit in")
    if out.device != result.device:
        raise ValueError(f"{name}: out= is on {out.device}; the result is on {result.device}")
    return out.copy_(result)


def without(x: torch.Tensor, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    """An empty result for a reduction of a tensor without values, as on the meta device."""
    sizes = [1 if d in dims else size for d, size in enumerate(x.shape) if keepdim or d not in dims]
    return x.new_empty(sizes)


def is_integer(value: Any) -> bool:
    """Whether this can be the number of a dimension."""
    return not isinstance(value, bool) and hasattr(type(value), "__index__")


def dimensions(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dimensions as sorted non-negative numbers; raises if one is given twice."""
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
    """How many arguments a function takes, and the defaults of the last of them."""
    name = getattr(fn, "__name__", repr(fn))
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError as error:  # one of C
        raise TypeError(f"{name} does not say how many arguments it takes: wrap it") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for p in parameters:
        if p.kind not in positional:
            raise TypeError(f"{name}: the arguments must have a fixed number; {p} has not")
    if not parameters:
        raise TypeError(f"{name} takes no arguments, so there is nothing to go over")
    return len(parameters), tuple(p.default for p in parameters if p.default is not p.empty)


def check_derivative(derivative: Any, arity: int) -> None:
    if not callable(derivative):
        raise TypeError(f"derivative= must be a function; got {type(derivative).__name__}")
    try:
        signature = inspect.signature(derivative)
    except ValueError:  # one of C
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
