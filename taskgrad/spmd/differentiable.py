"""Collectives as differentiable functions: of autograd's graph, and of ``torch.func``."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from taskgrad.graph.pytree import carries_gradient, flatten
from taskgrad.worker.collectives import Operation, Sum
from taskgrad.worker.forward_mode import check_shared
from taskgrad.worker.members import Members


def collective(operation: Operation, tree: Any, members: Members, title: str = "") -> Any:
    """Apply an operation to a pytree of tensors and numbers, among these ranks.

    Messages name it `title`, if that is given.
    """
    name = title or operation.name
    leaves, structure = flatten(tree)
    at = [i for i, leaf in enumerate(leaves) if leaf is not None]
    given = [_tensor(leaves[i], name) for i in at]
    for x in given:
        operation.check(x, members.size)
    if isinstance(operation, Sum):
        given = [x.to(torch.int64) if x.dtype is torch.bool else x for x in given]
    # On the host, where they go in any case. Torch has one thread a device for all backward passes
    # of a process, in which one rank must not wait for another; those of the CPU are their own.
    devices = [x.device for x in given]
    found = _exchange(members, operation, [x.cpu() for x in given])
    for i, value, device in zip(at, found, devices, strict=True):
        value = value.to(device)
        number = isinstance(leaves[i], bool | int | float | complex)
        leaves[i] = value.item() if number and operation.keeps_numbers else value
    return structure.build(leaves)


def _tensor(leaf: Any, name: str) -> torch.Tensor:
    if isinstance(leaf, bool | int):
        return torch.tensor(leaf)
    if isinstance(leaf, float | complex):
        return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.cdouble)
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
        kind = f"{leaf.layout} tensor" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        raise TypeError(f"{name} takes dense tensors and numbers; got a {kind}")
    return leaf


class _Recorded(torch.autograd.Function):
    """A collective as part of autograd's graph; its backward is one more.

    Its results are given to it, since only after the exchange is it known whether any rank takes a
    gradient. Inside the transforms of ``torch.func`` it is this function that gets at the tensors,
    so there it makes the exchange. It returns a token, the results, and for `pmax` and `pmin` the
    ties that `Extreme.join` counts.
    """

    @staticmethod
    def forward(
        members: Members,
        operation: Operation,
        results: list[torch.Tensor] | None,
        token: torch.Tensor,
        *xs: torch.Tensor,
    ) -> Any:
        if results is None:
            results, _ = operation.run(members, xs, True)
        return (token.clone(), *results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.members, ctx.operation, _, _, *xs = inputs
        ctx.forms = [(x.shape, x.dtype, x.device) for x in xs]
        ties = output[1 + len(xs) :]
        ctx.mark_non_differentiable(*ties)
        ctx.save_for_backward(*ties)
        ctx.save_for_forward(*ties)

    @staticmethod
    def backward(ctx: Any, token: torch.Tensor, *cotangents: torch.Tensor) -> Any:
        given = list(cotangents[: len(ctx.forms)])
        found = _exchange(ctx.members, ctx.operation.transpose(), given)
        return None, None, None, token, *_shared(found, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        check_shared()
        token = tangents[3]
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
            for tangent, (shape, dtype, device) in zip(tangents[4:], ctx.forms, strict=True)
        ]
        ties = ctx.saved_tensors
        operation = Sum() if ties else ctx.operation
        found = _exchange(ctx.members, operation, _shared(given, ties))
        return (token, *found, *(None for _ in ties))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        members: Members,
        operation: Operation,
        results: None,
        token: torch.Tensor,
        *xs: torch.Tensor,
    ) -> Any:
        batched = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(xs, in_dims[4:], strict=True)
        ]
        found = _Recorded.apply(members, operation.batched(), None, token, *batched)
        return found, (None, *(0 for _ in found[1:]))


def _shared(grads: list[torch.Tensor], ties: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """This rank's share of each gradient, where it goes to the ranks that have the result."""
    if not ties:
        return grads
    return [g * (tie > 0) / tie.clamp(min=1) for g, tie in zip(grads, ties, strict=True)]


def _exchange(members: Members, operation: Operation, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of an operation, recorded where that is wanted."""
    if any(map(is_functorch_wrapped_tensor, xs)):
        return _transformed(members, operation, xs)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    with torch.no_grad():
        found, wanted = operation.run(members, xs, wants)
    results, ties = found[: len(xs)], found[len(xs) :]
    if not wanted or not torch.is_grad_enabled():
        return results
    comm = members.comm
    at = [i for i, x in enumerate(xs) if carries_gradient(x)]
    given, floats = [xs[i] for i in at], [results[i] for i in at]
    comm.token, *floats = _Recorded.apply(members, operation, floats + ties, comm.token, *given)
    for i, value in zip(at, floats[: len(at)], strict=True):
        results[i] = value
    return results


def _transformed(
    members: Members, operation: Operation, xs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The results inside the transforms of ``torch.func``: an exchange of each kind of tensor."""
    results = list(xs)
    kinds = [(is_functorch_wrapped_tensor(x), carries_gradient(x)) for x in xs]
    for kind in sorted(set(kinds)):
        at = [i for i, own in enumerate(kinds) if own == kind]
        given = [xs[i] for i in at]
        if kind[0]:
            comm = members.comm
            # As below the transforms: where a gradient may be wanted there, the token goes along.
            is_recorded = torch.is_grad_enabled() and any(_inmost(x).requires_grad for x in given)
            token = comm.token if is_recorded else comm.start.detach()
            token, *found = _Recorded.apply(members, operation, None, token, *given)
            if is_recorded:
                comm.token = _inmost(token)
        else:
            with temporarily_clear_interpreter_stack():  # they are of no transform
                found = _exchange(members, operation, given)
        for i, value in zip(at, found[: len(at)], strict=True):
            results[i] = value
    return results


def _inmost(x: torch.Tensor) -> torch.Tensor:
    """The tensor that the transforms of ``torch.func`` have wrapped."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x
