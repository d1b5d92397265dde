"""Elementwise operations on tensors; their derivatives are operations, too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from taskgrad.kernels.autograd.reduction import sum_to
from taskgrad.kernels.autograd.transforms import Tensors, batched_first, differentiates
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.derivative import pullback, pushforward
from taskgrad.kernels.ir.expression import Expression
from taskgrad.kernels.runtime.launch import Launcher

Weak = tuple[bool, ...]

_operations: WeakValueDictionary[str, Operation] = WeakValueDictionary()


class Operation:
    """An expression on tensors, differentiable any number of times.

    Its key is unique in this process; `custom_op` finds the operation by it.
    """

    def __init__(self, expression: Expression, name: str, key: str, results: Any = None) -> None:
        self.expression, self.key = expression, key
        self.launcher = Launcher(expression, name, results)
        self.derivatives: dict[str, Operation] = {}
        _operations[key] = self

    def __call__(self, tensors: Tensors, weak: Weak | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs, recorded by autograd if an input requires gradients."""
        if differentiates(tensors):
            return Apply.apply(self, weak, *tensors)
        return tuple(self.launcher.run(tensors, weak))

    def derived(self, kind: str, which: tuple[int, ...]) -> Operation:
        """The ``pullback`` or ``pushforward`` for these arguments.

        One maps cotangents and all arguments to the cotangents of these arguments, the other
        tangents of these arguments and all arguments to the outputs' tangents.
        """
        part = f"{kind}({','.join(map(str, which))})"
        if part not in self.derivatives:
            if kind == "pullback":
                expression = pullback(self.expression, which)
                results = partial(_dtypes_of, which, len(self.expression.outputs))
            else:
                expression = pushforward(self.expression, which)
                results = partial(self._results_of, len(which))
            name = f"{self.launcher.name}.{part}"
            self.derivatives[part] = Operation(expression, name, f"{self.key}.{part}", results)
        return self.derivatives[part]

    def _results_of(self, shift: int, tensors: Tensors, weak: Sequence[bool]) -> list[str]:
        return self.launcher.dtypes_for(tensors[shift:], weak[shift:])

    def cotangents(
        self, wanted: tuple[int, ...], cotangents: Tensors, tensors: Tensors, weak: Weak | None
    ) -> list[torch.Tensor]:
        """The cotangents of the wanted arguments, in the arguments' shapes and dtypes."""
        derived = self.derived("pullback", wanted).expression
        found: dict[int, torch.Tensor] = {}
        for argument, index in zip(wanted, derived.outputs, strict=True):
            if index < len(cotangents):  # the cotangent itself
                found[argument] = cotangents[index].to(tensors[argument].dtype)
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
        """The cotangents, summed to these shapes in the same pass if that needs no graph."""
        pullback, common = self.derived("pullback", rest), inputs[0].shape
        if all(shape == common for shape in shapes) or differentiates(inputs) or 0 in common:
            return pullback(inputs, weak)
        sums = tuple(None if shape == common else shape for shape in shapes)
        return pullback.launcher.run(inputs, weak, sums=sums)


def _dtypes_of(
    which: tuple[int, ...], shift: int, tensors: Tensors, weak: Sequence[bool]
) -> list[str]:
    return [dtypes.dtype_name(tensors[shift + k].dtype) for k in which]


def operation_of(key: str) -> Operation:
    """The operation with this key, which may be a derived one."""
    base, *parts = key.split(".")
    operation = _operations[base]
    for part in parts:
        kind, _, which = part.rstrip(")").partition("(")
        operation = operation.derived(kind, tuple(map(int, which.split(","))))
    return operation


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
        operation = ctx.operation.derived("pushforward", moving)
        return operation([*[t.resolve_neg() for t in tangents if t is not None], *tensors], known)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, operation: Operation, weak: Weak | None, *tensors: Any
    ) -> Any:
        outputs = operation(batched_first(tensors, in_dims[2:]), weak)
        return outputs, (0,) * len(outputs)
