"""Sums over dimensions, the same bits whatever the number of threads, which torch's are not."""

from __future__ import annotations

from typing import Any

import torch

from taskgrad.kernels.runtime.reduce import sum_over


def sum_to(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """As ``x.sum_to_size(shape)``: the gradient of what was broadcast from that shape."""
    if x.shape == shape:
        return x
    missing = x.dim() - len(shape)
    dims = [d for d in range(x.dim()) if d < missing or shape[d - missing] != x.shape[d]]
    result: torch.Tensor = Sum.apply(x, tuple(dims))
    return result.reshape(shape)


class Sum(torch.autograd.Function):
    """A sum over dimensions in autograd's graph."""

    @staticmethod
    def forward(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        return sum_over(x, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.dims = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        for d in ctx.dims:
            g = g.unsqueeze(d)
        return g.expand(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, _dims: None) -> torch.Tensor:
        result: torch.Tensor = Sum.apply(t, ctx.dims)
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: torch.Tensor, dims: tuple[int, ...]) -> Any:
        return Sum.apply(x.movedim(in_dims[0], 0), tuple(d + 1 for d in dims)), 0
