"""An elementwise operation on tensors, and its derivatives: operations again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.autograd import forward_ad

from taskgrad.kernels.autograd.sums import sum_to
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.derivative import pullback, pushforward
from taskgrad.kernels.ir.expression import Formula
from taskgrad.kernels.runtime.launch import Launcher

Tensors = Sequence[torch.Tensor]
Weak = tuple[bool, ...]

_operations: WeakValueDictionary[str, Operation] = WeakValueDictionary()


class Operation:
    """A formula on tensors, differentiable as often as it can be derived.

    Parameters
    ----------
    formula : Formula
    name : str
    key : str
        Of its own in this process; an opaque operation of torch finds this one by it.
    """

    def __init__(self, formula: Formula, name: str, key: str, results: Any = None) -> None:
        self.formula, self.key = formula, key
        self.launcher = Launcher(formula, name, results)
        self.derivatives: dict[str, Operation] = {}
        _operations[key] = self

    def __call__(self, tensors: Tensors, weak: Weak | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs; part of autograd's graph where an input is."""
        if differentiates(tensors):
            return Apply.apply(self, weak, *tensors)
        return tuple(self.launcher.run(tensors, weak))

    def pullback(self, wanted: tuple[int, ...]) -> Operation:
        """From cotangents and arguments to the cotangents of the arguments wanted."""
        return self.derived("pullback", wanted)

    def pushforward(self, moving: tuple[int, ...]) -> Operation:
        """From tangents of the moving arguments and all arguments to the outputs' tangents."""
        return self.derived("pushforward", moving)

    def derived(self, way: str, which: tuple[int, ...]) -> Operation:
        """One of the two above, by its name."""
        part = f"{way}({','.join(map(str, which))})"
        if part not in self.derivatives:
            if way == "pullback":
                formula = pullback(self.formula, which)
                results = partial(_as, which, len(self.formula.outputs))
            else:
                formula = pushforward(self.formula, which)
                results = partial(self._results_of, len(which))
            name = f"{self.launcher.name}.{part}"
            self.derivatives[part] = Operation(formula, name, f"{self.key}.{part}", results)
        return self.derivatives[part]

    def _results_of(self, shift: int, tensors: Tensors, weak: Sequence[bool]) -> list[str]:
        return self.launcher.dtypes_for(tensors[shift:], weak[shift:])

    def cotangents(
        self, wanted: tuple[int, ...], cotangents: Tensors, tensors: Tensors, weak: Weak | None
    ) -> list[torch.Tensor]:
        """Those of the arguments wanted, in their shapes and dtypes."""
        derived = self.pullback(wanted).formula
        found: dict[int, torch.Tensor] = {}
        for argument, place in zip(wanted, derived.outputs, strict=True):
            if place < len(cotangents):  # the cotangent itself: nothing to compute
                found[argument] = cotangents[place].to(tensors[argument].dtype)
        rest = tuple(argument for argument in wanted if argument not in found)
        if rest:
            known = None if weak is None else (*[False] * len(cotangents), *weak)
            shapes = [tensors[argument].shape for argument in rest]
            results = self._pulled_back(rest, [*cotangents, *tensors], known, shapes)
            found.update(zip(rest, results, strict=True))
        return [sum_to(found[argument], tensors[argument].shape) for argument in wanted]

    def _pulled_back(
        self, rest: tuple[int, ...], inputs: Tensors, weak: Weak | None, shapes: list[torch.Size]
    ) -> Tensors:
        """Those of the arguments, summed to these shapes already where that needs no graph."""
        pullback, common = self.pullback(rest), inputs[0].shape
        if all(shape == common for shape in shapes) or differentiates(inputs) or 0 in common:
            return pullback(inputs, weak)
        sums = tuple(None if shape == common else shape for shape in shapes)
        return pullback.launcher.run(inputs, weak, sums=sums)


def _as(which: tuple[int, ...], shift: int, tensors: Tensors, weak: Sequence[bool]) -> list[str]:
    return [dtypes.name_of(tensors[shift + k].dtype) for k in which]


def operation_of(key: str) -> Operation:
    """The operation with this key, a derived one too."""
    base, *parts = key.split(".")
    operation = _operations[base]
    for part in parts:
        way, _, which = part.rstrip(")").partition("(")
        operation = operation.derived(way, tuple(map(int, which.split(","))))
    return operation


def differentiates(tensors: Tensors) -> bool:
    """Whether a call has to be part of autograd's graph, or is inside a transform of torch.func."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return False


class Apply(torch.autograd.Function):
    """An operation in autograd's graph."""

    @staticmethod
    def forward(operation: Operation, weak: Weak | None, *tensors: torch.Tensor) -> Any:
        return tuple(operation.launcher.run(tensors, weak))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operation, ctx.weak, *tensors = inputs
        ctx.mark_non_differentiable(*[t for t in output if not t.is_floating_point()])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        tensors = ctx.saved_tensors
        cotangents = tuple([c.resolve_neg() if c.is_neg() else c for c in cotangents])
        wanted = tuple(k for k, needed in enumerate(ctx.needs_input_grad[2:]) if needed)
        results = ctx.operation.cotangents(wanted, cotangents, tensors, ctx.weak)
        found = dict(zip(wanted, results, strict=True))
        return None, None, *[found.get(k) for k in range(len(tensors))]

    @staticmethod
    def jvp(ctx: Any, _operation: None, _weak: None, *tangents: torch.Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        moving = tuple(k for k, t in enumerate(tangents) if t is not None)
        known = None if ctx.weak is None else (*[False] * len(moving), *ctx.weak)
        operation = ctx.operation.pushforward(moving)
        return operation([*[t.resolve_neg() for t in tangents if t is not None], *tensors], known)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, operation: Operation, weak: Weak | None, *tensors: Any
    ) -> Any:
        outputs = operation(batched_first(tensors, in_dims[2:]), weak)
        return outputs, (0,) * len(outputs)


def batched_first(tensors: Tensors, in_dims: Sequence[int | None]) -> list[torch.Tensor]:
    """Tensors whose batch dimension is the first, and which broadcast as the single ones did."""
    pairs = list(zip(tensors, in_dims, strict=True))
    rank = max(t.dim() - (d is not None) for t, d in pairs)
    moved = []
    for tensor, dim in pairs:
        if dim is not None:
            first = tensor.movedim(dim, 0)
            missing = (1,) * (rank - first.dim() + 1)
            tensor = first.reshape(first.shape[0], *missing, *first.shape[1:])
        moved.append(tensor)
    return moved
