"""A layer that holds a vectorized function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from taskgrad.kernels.function import vectorize
from taskgrad.kernels.vectorized import Vectorized


class Elementwise(nn.Module):
    """A vectorized function as a layer, for an ``nn.Sequential`` or a chain.

    On a worker it is compiled once a machine: the first worker that needs a loop compiles it, the
    others load its machine code.

    Parameters
    ----------
    fn : callable
        What `vectorize` made, or a scalar function for it.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> leaky = tg.Elementwise(lambda x: x if x > 0 else 0.1 * x)
    >>> torch.nn.Sequential(torch.nn.Identity(), leaky)(torch.tensor([-1.0, 2.0]))
    tensor([-0.1000,  2.0000])
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Elementwise takes a function; got {type(fn).__name__}")
        self.fn: Vectorized = fn if isinstance(fn, Vectorized) else vectorize(fn)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The function of the tensors."""
        return self.fn(*tensors)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.fn.__name__
