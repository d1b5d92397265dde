"""Hooks on the gradients of parameters, run when plain torch runs them: once a backward.

A parameter that several calls use gets its gradient in parts. Hooks see their sum, where the
parameter lives: not the parts, and not on the workers of its copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from taskgrad.errors import LayerError
from taskgrad.graph.calls import Draw
from taskgrad.graph.parameter_extras import Hooks
from taskgrad.worker.failures import layer_errors
from taskgrad.worker.randomness import random_stream
from taskgrad.worker_names import WorkerName


def hooks_off(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Disable the hooks of these parameters."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    return _disabled(hooks) if hooks else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _disabled(of_each: list[Hooks]) -> Iterator[None]:
    held = [(hooks, dict(hooks)) for hooks in of_each]
    try:
        for hooks in of_each:
            hooks.clear()
        yield
    finally:
        for hooks, before in held:
            # Hooks that were added meanwhile come after the ones from before.
            added = dict(hooks)
            hooks.clear()
            hooks.update({**before, **added})


def accumulate_hooked(
    parameter: nn.Parameter,
    total: torch.Tensor,
    *,
    name: str,
    worker: WorkerName,
    draw: Draw | None,
    fixed: str | None,
) -> None:
    """Add to a parameter's gradient as autograd does: hooks, sum, post-accumulate hooks.

    `total` may be written: it shares its memory with no other tensor. `fixed` is the reason why
    hooks may not change the parameter now, None if they may.

    Raises LayerError if a hook raised, or changed the parameter though `fixed` forbids it.
    """
    before = None
    if fixed is not None and parameter._post_accumulate_grad_hooks:
        before = parameter.detach().clone()
    stream = nullcontext() if draw is None else random_stream(*draw, name)
    with layer_errors(f"a hook of parameter {name!r}", name, worker), stream:
        torch.autograd.backward(parameter, total)
    if before is not None and not torch.allclose(parameter, before, rtol=0, atol=0, equal_nan=True):
        with torch.no_grad():
            parameter.copy_(before)
        raise LayerError(
            f"a hook of parameter {name!r} on worker {worker} changed the parameter, {fixed}",
            name,
            worker.address,
            None,
        )


def hooked_gradient(
    parameter: nn.Parameter, total: torch.Tensor, *, name: str, worker: WorkerName
) -> torch.Tensor:
    """A gradient after its hooks; nothing is accumulated.

    Raises LayerError if a hook raised.
    """
    with layer_errors(f"a hook of parameter {name!r}", name, worker):
        [found] = torch.autograd.grad(parameter, parameter, total)
    return found
