"""Scalar functions, expressions of them and layers of them, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from taskgrad.kernels.vectorized import Vectorized


def vectorize(
    fn: Callable[..., Any] | None = None, derivative: Callable[..., Any] | None = None
) -> Any:
    """Make a scalar function an elementwise operation on tensors, compiled by Numba.

    The result takes tensors and numbers that broadcast together, of any strides, on the CPU, and
    `out=`. Each combination of dtypes is compiled once a machine and kept on disk. It is part of
    torch's autograd, `torch.func` and `torch.compile`; see `Vectorized` for reductions.

    Parameters
    ----------
    fn : callable
        Of numbers, with a fixed number of arguments. Arithmetic, functions of `math`, comparisons,
        conditionals, local variables, constants from outside, and calls of other functions,
        vectorized or not, are differentiated automatically. Any other function that Numba compiles,
        such as a loop whose end depends on an argument, needs `derivative` for its gradient.
    derivative : callable or None
        Of the same arguments: the derivative, or for several arguments a tuple with one for each.

    Returns
    -------
    Vectorized
        Without `fn`, a decorator that makes one.

    Raises
    ------
    TypeError
        The number of arguments is not fixed. At the first call: compiling would change the
        function's meaning (random numbers, a counter, `try`); the message says where.
    ModuleNotFoundError
        At the first call: Numba is not installed.
    DerivativeError
        At the first gradient: a part has no derivative; the message says which.

    Examples
    --------
    >>> import math, torch, taskgrad as tg
    >>> @tg.vectorize
    ... def softplus(x):
    ...     return x if x > 20 else math.log1p(math.exp(x))
    >>> x = torch.tensor([0.0, 50.0], requires_grad=True)
    >>> y = softplus(x)
    >>> y.detach()
    tensor([ 0.6931, 50.0000])
    >>> y.sum().backward()
    >>> x.grad
    tensor([0.5000, 1.0000])
    """
    if fn is None:
        return lambda found: vectorize(found, derivative)
    if not callable(fn):
        raise TypeError(f"vectorize takes a function; got {type(fn).__name__}")
    return Vectorized(fn, derivative)


def fuse(fn: Callable[..., Any]) -> Vectorized:
    """Fuse an expression of vectorized functions into one loop, which reads memory once.

    Parameters
    ----------
    fn : callable
        Of tensors: calls of vectorized functions, arithmetic, and the elementwise functions of
        torch that `math` has too, with `torch.where`, `torch.sigmoid` and `torch.relu`.

    Returns
    -------
    Vectorized
        Its gradients are one loop, too.

    Raises
    ------
    TypeError
        A part is not elementwise, or has no rule; the message says which.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> square = tg.vectorize(lambda x: x * x)
    >>> both = tg.fuse(lambda x, y: square(x) + torch.sqrt(square(y)))
    >>> both(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]))
    tensor([4., 8.])
    """
    if not callable(fn):
        raise TypeError(f"fuse takes a function; got {type(fn).__name__}")
    fused = Vectorized(fn)
    if fused.unsupported:
        raise TypeError(f"{fused.__name__} cannot be fused: {fused.unsupported}")
    return fused


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
