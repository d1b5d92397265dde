"""Reductions and scans in autograd's graph.

With y the running results of f along a dimension, y[i] = f(y[i-1], x[i]), the cotangents obey

    h[i] = g[i] + h[i+1] f1(y[i], x[i+1])      of y[i], from the last to the first
    gx[i] = h[i] f2(y[i-1], x[i])              of x[i]

where f1 and f2 are the derivatives of f by its arguments. A reduction is the last running result.
The recurrence is an operation with a derivative of its own, so this can be derived again. Where f1
and f2 are 1 everywhere, as in a sum, none of it is needed: each element gets the cotangent itself.
"""

from __future__ import annotations

from typing import Any

import torch

from taskgrad.kernels.autograd.operation import Operation, differentiates
from taskgrad.kernels.ir.derivative import partials
from taskgrad.kernels.runtime.reduce import Folder, recurrence


class Reduction:
    """Reduces and scans with a function of two arguments.

    Parameters
    ----------
    operation : Operation
        The function, elementwise.
    """

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.folder = Folder(operation.formula, operation.launcher.name)
        self._sums: bool | None = None

    @property
    def sums(self) -> bool:
        """Whether both derivatives are 1 everywhere."""
        if self._sums is None:
            self._sums = partials(self.operation.formula) == [1.0, 1.0]
        return self._sums

    def fold(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """The reduction over these dimensions, without them."""
        if differentiates((x,)):
            return Fold.apply(self, dims, x)
        return self.folder.fold(x.resolve_neg(), dims)

    def scan(self, x: torch.Tensor) -> torch.Tensor:
        """The running results along the last dimension."""
        if differentiates((x,)):
            return Scan.apply(self, x)
        return self.folder.scan(x.resolve_neg().contiguous())

    def slopes(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f1 and f2 at (y[i-1], x[i]), for all i but the first."""
        before, after = y[..., :-1], x[..., 1:]
        ones = torch.ones_like(after)
        pullback = self.operation.pullback((0, 1))
        first, second = pullback([ones, before, after])
        return first, second

    def cotangent(self, x: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """That of x, from that of the running results."""
        if self.sums:
            return _recur(torch.ones_like(g), g.flip(-1)).flip(-1)
        first, second = self.slopes(x, y)
        one = torch.ones_like(x[..., :1])
        h = _recur(torch.cat([one, first.flip(-1)], -1), g.flip(-1)).flip(-1)
        return torch.cat([one, second], -1) * h

    def tangent(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """That of the running results, from that of x."""
        if self.sums:
            return _recur(torch.ones_like(t), t)
        first, second = self.slopes(x, y)
        one = torch.ones_like(x[..., :1])
        return _recur(torch.cat([one, first], -1), torch.cat([one, second], -1) * t)


def rows_of(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """These dimensions as one, the last."""
    kept = [d for d in range(x.dim()) if d not in dims]
    return x.permute(*kept, *dims).flatten(len(kept)) if dims else x.unsqueeze(-1)


class Fold(torch.autograd.Function):
    """A reduction."""

    @staticmethod
    def forward(reduction: Reduction, dims: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        return reduction.folder.fold(x, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, ctx.dims, x = inputs
        ctx.shape = x.shape
        if not ctx.reduction.sums:  # a sum's gradient needs no values
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        dims = ctx.dims
        if ctx.reduction.sums:
            for d in dims:
                g = g.unsqueeze(d)
            return None, None, g.expand(ctx.shape)
        (x,) = ctx.saved_tensors
        rows = rows_of(x, dims)
        last = torch.cat([torch.zeros_like(rows[..., 1:]), g.unsqueeze(-1)], -1)
        found = ctx.reduction.cotangent(rows, ctx.reduction.scan(rows), last)
        kept = [d for d in range(x.dim()) if d not in dims]
        order = [*kept, *dims]
        found = found.reshape([x.shape[d] for d in order])
        return None, None, found.permute([order.index(d) for d in range(x.dim())])

    @staticmethod
    def jvp(ctx: Any, _reduction: None, _dims: None, t: torch.Tensor) -> torch.Tensor:
        if ctx.reduction.sums:
            return ctx.reduction.fold(t, ctx.dims)
        (x,) = ctx.saved_tensors
        rows = rows_of(x, ctx.dims)
        tangent = ctx.reduction.tangent(rows, ctx.reduction.scan(rows), rows_of(t, ctx.dims))
        return tangent[..., -1].clone()  # a view of a tangent is refused

    @staticmethod
    def vmap(info: Any, in_dims: Any, reduction: Reduction, dims: Any, x: torch.Tensor) -> Any:
        moved = x.movedim(in_dims[2], 0)
        return reduction.fold(moved, tuple(d + 1 for d in dims)), 0


class Scan(torch.autograd.Function):
    """Running results along the last dimension."""

    @staticmethod
    def forward(reduction: Reduction, x: torch.Tensor) -> torch.Tensor:
        return reduction.folder.scan(x.contiguous())

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


def _recur(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """h[i] = g[i] + a[i] h[i-1] along the last dimension; differentiable by both."""
    if differentiates((a, g)):
        return Recurrence.apply(a, g)
    return _recurrence(a, g)


def _recurrence(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    # Half precision is computed in float32 here as everywhere.
    wide = torch.float32 if g.dtype in (torch.float16, torch.bfloat16) else g.dtype
    wide_a, wide_g = (t.to(wide).resolve_neg().contiguous() for t in (a, g))
    return recurrence(wide_a, wide_g).to(g.dtype)


class Recurrence(torch.autograd.Function):
    """The recurrence above."""

    @staticmethod
    def forward(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return _recurrence(a, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        a, h = ctx.saved_tensors
        zero = torch.zeros_like(h[..., :1])
        later = torch.cat([zero, a[..., 1:].flip(-1)], -1)
        gg = _recur(later, c.flip(-1)).flip(-1)
        return gg * torch.cat([zero, h[..., :-1]], -1), gg

    @staticmethod
    def jvp(ctx: Any, ta: torch.Tensor | None, tg: torch.Tensor | None) -> torch.Tensor:
        a, h = ctx.saved_tensors
        total = torch.zeros_like(h) if tg is None else tg
        if ta is not None:
            before = torch.cat([torch.zeros_like(h[..., :1]), h[..., :-1]], -1)
            total = total + ta * before
        return _recur(a, total)

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: torch.Tensor, g: torch.Tensor) -> Any:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((a, g), in_dims, strict=True)
        ]
        return _recur(*moved), 0
