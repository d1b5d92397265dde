"""A layer with branches that can run on different workers (Flux's and DaggerFlux's Parallel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Parallel(nn.Module):
    """Give one input to several branches and join their outputs.

    As a plain module it computes ``connection(*[branch(x) for branch in branches])``. In a
    `GraphChain` every branch is its own path through the graph: branches may sit on different
    workers, run at the same time, and are differentiated (the input's cotangents are summed where
    the input was made).

    Parameters
    ----------
    connection : callable or nn.Module
        Takes one argument per branch, e.g. ``torch.add`` or a module that concatenates.
    *branches : nn.Module
        At least one; ``nn.Identity()`` makes a skip.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> block = tg.Parallel(torch.add, torch.nn.Identity(), torch.nn.Linear(3, 3))
    >>> block(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, connection: Callable[..., Any], *branches: nn.Module) -> None:
        super().__init__()
        if isinstance(connection, type) and issubclass(connection, nn.Module):
            raise TypeError(
                f"Parallel's connection is the class {connection.__name__}: make a module of it"
            )
        if not callable(connection):
            raise TypeError(
                f"Parallel's connection must be callable (torch.add, a module); "
                f"got {type(connection).__name__}"
            )
        if not branches:
            raise ValueError("Parallel needs at least one branch")
        for i, branch in enumerate(branches):
            if not isinstance(branch, nn.Module):
                raise TypeError(
                    f"branch {i} of Parallel is a {type(branch).__name__}, not an nn.Module"
                )
        self.connection = connection
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Any) -> Any:
        """Run the branches in order and join their outputs."""
        return self.connection(*[branch(x) for branch in self.branches])
