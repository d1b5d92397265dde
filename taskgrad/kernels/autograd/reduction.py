"""Reductions and scans with gradients.

Let f be the function, f1 and f2 its partial derivatives, y[i] = f(y[i-1], x[i]) the running results
along a dimension, and g the cotangents of y. Then h and gx are the total cotangents of y and x:

    h[i] = g[i] + h[i+1] f1(y[i], x[i+1])
    gx[i] = h[i] f2(y[i-1], x[i])

A reduction is the last running result. The recurrence is an operation with a derivative of its own,
so this can be differentiated again. If f1 and f2 are 1 everywhere, as in a sum, none of it is
needed: each element gets the cotangent of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from taskgrad.kernels.autograd.transforms import Tensors, differentiates
from taskgrad.kernels.ir.derivative import constant_partials
from taskgrad.kernels.runtime.reduce import SUM, Reducer, recurrence


class Reduction:
    """Reduces and scans with a function of two arguments.

    Its elementwise pullback takes cotangents and both arguments, and returns the arguments'
    cotangents.
    """

    def __init__(self, reducer: Reducer, pullback: Callable[[Tensors], Tensors]) -> None:
        self.reducer, self._pullback = reducer, pullback

    @cached_property
    def is_sum(self) -> bool:
        """True if both partial derivatives are 1 everywhere."""
        return constant_partials(self.reducer.expression) == [1.0, 1.0]

    def reduce(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """The reduction over these dimensions, which are removed."""
        if differentiates((x,)):
            return Reduce.apply(self, dims, x)
        return self.reducer.reduce(x.resolve_neg(), dims)

    def scan(self, x: torch.Tensor) -> torch.Tensor:
        """The running results along the last dimension."""
        if differentiates((x,)):
            return Scan.apply(self, x)
        return self.reducer.scan(x.resolve_neg().contiguous())

    def _partials(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f1 and f2 at (y[i-1], x[i]), for all i but the first."""
        before, after = y[..., :-1], x[..., 1:]
        first, second = self._pullback([torch.ones_like(after), before, after])
        return first, second

    def cotangent(self, x: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The cotangent of x, given that of the running results y."""
        if self.is_sum:
            return _recurrence(torch.ones_like(g), g.flip(-1)).flip(-1)
        first, second = self._partials(x, y)
        one = torch.ones_like(x[..., :1])
        h = _recurrence(torch.cat([one, first.flip(-1)], -1), g.flip(-1)).flip(-1)
        return torch.cat([one, second], -1) * h

    def tangent(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The tangent of the running results y, given that of x."""
        if self.is_sum:
            return _recurrence(torch.ones_like(t), t)
        first, second = self._partials(x, y)
        one = torch.ones_like(x[..., :1])
        return _recurrence(torch.cat([one, first], -1), torch.cat([one, second], -1) * t)


def sum_to(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """As ``x.sum_to_size(shape)``, with the same bits for any number of threads."""
    if x.shape == shape:
        return x
    if not x.numel():
        return x.sum_to_size(shape)
    missing = x.dim() - len(shape)
    dims = [d for d in range(x.dim()) if d < missing or shape[d - missing] != x.shape[d]]
    return _SUM.reduce(x, tuple(dims)).reshape(shape)


_SUM = Reduction(SUM, tuple)  # its partial derivatives are constants: no pullback is called


def _flatten_to_last(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """These dimensions as one, the last."""
    kept = [d for d in range(x.dim()) if d not in dims]
    return x.permute(*kept, *dims).flatten(len(kept)) if dims else x.unsqueeze(-1)


class Reduce(torch.autograd.Function):
    """A reduction over some dimensions."""

    @staticmethod
    def forward(reduction: Reduction, dims: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        return reduction.reducer.reduce(x, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, ctx.dims, x = inputs
        ctx.shape = x.shape
        if not ctx.reduction.is_sum:  # a sum's gradient needs no values
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        dims = ctx.dims
        if ctx.reduction.is_sum:
            for d in dims:
                g = g.unsqueeze(d)
            return None, None, g.expand(ctx.shape)
        (x,) = ctx.saved_tensors
        rows = _flatten_to_last(x, dims)
        last = torch.cat([torch.zeros_like(rows[..., 1:]), g.unsqueeze(-1)], -1)
        found = ctx.reduction.cotangent(rows, ctx.reduction.scan(rows), last)
        kept = [d for d in range(x.dim()) if d not in dims]
        order = [*kept, *dims]
        found = found.reshape([x.shape[d] for d in order])
        return None, None, found.permute([order.index(d) for d in range(x.dim())])

    @staticmethod
    def jvp(ctx: Any, _reduction: None, _dims: None, t: torch.Tensor) -> torch.Tensor:
        if ctx.reduction.is_sum:
            return ctx.reduction.reduce(t, ctx.dims)
        (x,) = ctx.saved_tensors
        rows = _flatten_to_last(x, ctx.dims)
        tangent = ctx.reduction.tangent(
            rows, ctx.reduction.scan(rows), _flatten_to_last(t, ctx.dims)
        )
        return tangent[..., -1].clone()  # a view of a tangent is refused

    @staticmethod
    def vmap(info: Any, in_dims: Any, reduction: Reduction, dims: Any, x: torch.Tensor) -> Any:
        moved = x.movedim(in_dims[2], 0)
        return reduction.reduce(moved, tuple(d + 1 for d in dims)), 0


class Scan(torch.autograd.Function):
    """Running results along the last dimension."""

    @staticmethod
    def forward(reduction: Reduction, x: torch.Tensor) -> torch.Tensor:
        return reduction.reducer.scan(x.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, x = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return None, ctx.reduction.cotangent(x, y, g)

    @staticmethod
    def jvp(ctx: Any, _reduction: None, t: torch.Tensor) -> torch.Tensor:
        x, y = ctx.saved_tensors
        return ctx.reduction.tangent(x, y, t)

    @staticmethod
    def vmap(info: Any, in_dims: Any, reduction: Reduction, x: torch.Tensor) -> Any:
        return reduction.scan(x.movedim(in_dims[1], 0)), 0


def _recurrence(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """h[i] = g[i] + a[i] h[i-1] along the last dimension; differentiable in both."""
    if differentiates((a, g)):
        return Recurrence.apply(a, g)
    return _run_recurrence(a, g)


def _run_recurrence(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    # Half precision is computed in float32.
    wide = torch.float32 if g.dtype in (torch.float16, torch.bfloat16) else g.dtype
    wide_a, wide_g = (t.to(wide).resolve_neg().contiguous() for t in (a, g))
    return recurrence(wide_a, wide_g).to(g.dtype)


class Recurrence(torch.autograd.Function):
    """The recurrence above, in autograd's graph."""

    @staticmethod
    def forward(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return _run_recurrence(a, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        a, h = ctx.saved_tensors
        zero = torch.zeros_like(h[..., :1])
        later = torch.cat([zero, a[..., 1:].flip(-1)], -1)
        gg = _recurrence(later, c.flip(-1)).flip(-1)
        return gg * torch.cat([zero, h[..., :-1]], -1), gg

    @staticmethod
    def jvp(ctx: Any, ta: torch.Tensor | None, tg: torch.Tensor | None) -> torch.Tensor:
        a, h = ctx.saved_tensors
        total = torch.zeros_like(h) if tg is None else tg
        if ta is not None:
            before = torch.cat([torch.zeros_like(h[..., :1]), h[..., :-1]], -1)
            total = total + ta * before
        return _recurrence(a, total)

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: torch.Tensor, g: torch.Tensor) -> Any:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((a, g), in_dims, strict=True)
        ]
        return _recurrence(*moved), 0
