"""Gradients of parameters, from a backward into ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, _engine_run_backward

from taskgrad.graph.calls import Draw
from taskgrad.graph.cotangents import Gradient, add
from taskgrad.graph.memory_layout import is_dense
from taskgrad.graph.parameter_extras import has_hooks
from taskgrad.worker.hooks import accumulate_hooked
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker_names import WorkerName

_PLAIN = frozenset({torch.Tensor, nn.Parameter, GradientEdge})


def gradients(
    outputs: Sequence[torch.Tensor | GradientEdge],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    retain: bool,
) -> Sequence[Gradient]:
    """As ``torch.autograd.grad``, None for inputs that the outputs do not depend on.

    That takes longer to check its arguments than small layers take; cotangents fit already.
    """
    if not _PLAIN.issuperset(map(type, (*outputs, *inputs, *cotangents))):
        return torch.autograd.grad(
            cast(Any, outputs), inputs, cotangents, retain_graph=retain, allow_unused=True
        )
    return _engine_run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def own(grads: dict[str, Gradient], shared: Iterable[Any]) -> dict[str, Gradient]:
    """The same gradients, each in memory that is all its own, so that it can be added to.

    Autograd may return one tensor for several: for both terms of a sum, say, and for the cotangent
    that came in. `shared` are the other tensors that go somewhere, as inputs or results of a task.
    """
    strided = torch.strided
    taken = {
        t.untyped_storage().data_ptr()
        for t in shared
        if isinstance(t, torch.Tensor) and t.layout is strided
    }
    found: dict[str, Gradient] = {}
    for name, grad in grads.items():
        if grad is not None and grad.layout is strided:
            storage = grad.untyped_storage()
            address = storage.data_ptr()
            # Not its size: what is expanded has less memory than elements, a view has more.
            if address in taken or storage.nbytes() != grad.nbytes:
                grad = grad.clone()
                address = grad.untyped_storage().data_ptr()
            taken.add(address)
        found[name] = grad
    return found


def summed(parameter: nn.Parameter, parts: Sequence[Gradient], borrowed: Iterable[Any]) -> Gradient:
    """The sum of these parts of a parameter's gradient, in order, in memory of its own.

    `borrowed` are values that are not ours to keep: Dask's memory.
    """
    total: Gradient = None
    for part in parts:
        total = add(total, None if part is None else part.to(parameter.device))
    if total is not None and any(total is value for value in borrowed):
        return total.clone()
    return total


def accumulate_into(
    shard: ResidentShard,
    name: str,
    parts: Sequence[Gradient],
    borrowed: Iterable[Any],
    *,
    worker: WorkerName,
    draw: Draw | None = None,
) -> None:
    """Add the sum of these parts, in order, to a parameter's gradient.

    They are summed before they are added, as autograd does for a parameter that is used twice.
    `borrowed` are values whose memory belongs to Dask, and which must not be kept. Hooks draw
    random numbers from `draw`'s stream for the parameter's name.
    """
    total = summed(shard.parameters[name], parts, borrowed)
    accumulate_each(shard, {name: total}, worker=worker, draw=draw)


def accumulate_each(
    shard: ResidentShard, totals: Mapping[str, Gradient], *, worker: WorkerName, draw: Draw | None
) -> None:
    """Add to the gradients of parameters, by name; for the rest see `accumulate_into`.

    Each is on its parameter's device, in memory of its own.
    """
    strided = torch.strided
    for name, total in totals.items():
        if total is None:
            continue
        parameter = shard.parameters[name]
        if has_hooks(parameter):
            fixed = shard.why_fixed(name)
            accumulate_hooked(
                parameter, total.clone(), name=name, worker=worker, draw=draw, fixed=fixed
            )
            continue
        grad = parameter.grad
        if grad is None:
            parameter.grad = _laid_out_as(parameter, total)
        elif grad.layout is total.layout is strided:
            grad.add_(total)
        else:
            parameter.grad = grad + total


def _laid_out_as(parameter: nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    """The gradient with the strides that autograd would use: norms are summed in that order."""
    strided = torch.strided
    if grad.layout is not strided or parameter.layout is not strided:
        return grad
    if grad.stride() == parameter.stride() or not is_dense(parameter):
        return grad
    return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
