"""Reductions and scans on CPU tensors; no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from taskgrad.kernels.codegen import reduce_source
from taskgrad.kernels.codegen.nontemporal import last_level_cache
from taskgrad.kernels.codegen.numba_typing import type_of_call
from taskgrad.kernels.codegen.scalar_code import ScalarCode
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.expression import Builder, Expression, inlined
from taskgrad.kernels.runtime.kernel_cache import Kernel, compile_kernel
from taskgrad.kernels.runtime.reduce_pass import FullReduce, Pass, Step, make_pass
from taskgrad.kernels.runtime.thread_team import CallStats

_PLANS = 4_096
_FULL_REDUCES = 16  # each keeps scratch memory for every thread
_COMMUTATIVE = {"add", "mul", "and", "or", "xor"}


@dataclass(frozen=True)
class _Plan:
    """A reduction of one dimension: its first pass, and the layout of that pass's results."""

    first: Pass
    shape: tuple[int, ...]  # outer dimensions, segments, columns
    dtype: torch.dtype
    column: int | None  # which dimension of the result the columns are


class Reducer:
    """Reduces and scans with one function of two arguments."""

    def __init__(self, expression: Expression, name: str) -> None:
        self.expression, self._inlined, self._name = expression, inlined(expression), name
        self._plans: dict[Any, _Plan] = {}
        self._steps: dict[Any, Sequence[Step | FullReduce]] = {}
        self._by_dim: dict[Any, Sequence[Step | FullReduce]] = {}  # as `_steps`, by `dim` as given
        self._full_reduces = 0
        # By variant (``rows``, ``columns``, ``lanes``, ``scan``) and dtype.
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self.last: dict[str, CallStats] = {}  # of the last calls, by part

    def repeat(self, x: torch.Tensor, dim: int | None) -> torch.Tensor | None:
        """As `reduce` over one dimension or all, if a call like it has recorded its steps.

        Checks nothing else, since small calls are mostly this; so are large ones, whose elements
        have evicted everything else from the caches.
        """
        key = x.dtype, x.shape, x.stride(), dim
        steps = self._by_dim.get(key)
        if steps is None:
            rank = x.dim()
            if dim is not None and not -rank <= dim < rank:
                return None
            dims = tuple(range(rank)) if dim is None else (dim % rank,)
            steps = self._steps.get((*key[:3], dims))
            if steps is None:
                return None
            self._by_dim[key] = steps
        for step in steps:
            x = step.run(x)
        return x

    def reduce(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """The reduction over some non-empty dimensions, which are removed."""
        if not dims:
            return x.clone()
        steps: list[Step] = []
        result, part = x, "reduce"
        for last, count in _groups(x, dims):
            first = last - count + 1
            joined = result if count == 1 else _flattened(result, first, last)
            if joined is not None:
                result = self._reduce_dim(joined, first, part, steps)
            else:
                for dim in range(last, first - 1, -1):
                    result, part = self._reduce_dim(result, dim, part, steps), "reduce.rest"
            part = "reduce.rest"
        if steps and result.dtype == x.dtype and result.is_contiguous() and result.numel():
            self._record((x.dtype, x.shape, x.stride(), dims), steps, result.shape)
        return result.to(x.dtype)

    def _record(self, key: Any, steps: Sequence[Step], shape: torch.Size) -> None:
        """Record the steps of a reduction to this shape, for `repeat`."""
        if key in self._steps:  # `reduce` also serves calls that `repeat` does not take
            return
        if len(self._steps) >= _PLANS:
            self._steps.clear()
            self._by_dim.clear()
            self._full_reduces = 0
        *before, end = steps
        if before or shape or not end.only.bidirectional or self._full_reduces == _FULL_REDUCES:
            self._steps[key] = [*before, replace(end, shape=shape)]
        else:
            self._full_reduces += 1
            self._steps[key] = [FullReduce(end)]

    def scan(self, x: torch.Tensor) -> torch.Tensor:
        """The running results along the last dimension of a contiguous tensor."""
        length = x.shape[-1]
        if x.numel() == 0:
            return x.clone()
        rows = x.numel() // length
        segment = reduce_source.SCAN_SEGMENT
        segments = -(-length // segment)
        before = x
        if segments > 1:
            before = self.scan(self._totals(x.view(rows, length), segment))
        out = torch.empty_like(x)
        kernel = self._kernel("scan", dtypes.dtype_name(x.dtype))
        parameters = (0, length, 1, segment, segments)
        only = make_pass(kernel, parameters, rows * segments, x.numel())
        nbytes = x.nbytes + before.nbytes + out.nbytes
        self.last["scan"] = only.run(x, before, out, nbytes=nbytes)
        return out

    def _totals(self, x: torch.Tensor, segment: int) -> torch.Tensor:
        """The reduction of each segment of each row."""
        rows, length = x.shape
        segments = -(-length // segment)
        dtype = dtypes.dtype_name(x.dtype)
        out = torch.empty(rows, segments, dtype=dtypes.computed_dtype(dtype))
        parameters = (1, length, 1, segment, segments, 1, 0, 1, rows, length)
        only = make_pass(self._kernel("rows", dtype), parameters, rows * segments, x.numel())
        self.last["scan.totals"] = only.run(x, out, nbytes=x.nbytes + out.nbytes)
        return out

    def _reduce_dim(self, x: torch.Tensor, dim: int, part: str, steps: list[Step]) -> torch.Tensor:
        key = x.dtype, x.shape, x.stride(), dim
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(x, dim)
        out = torch.empty(plan.shape, dtype=plan.dtype)
        if out.numel():
            nbytes = x.nbytes + out.nbytes
            self.last[part] = plan.first.run(x, out, nbytes=nbytes)
            steps.append(Step(plan.first, plan.shape, plan.dtype, nbytes, part, self.last))
        if plan.shape[-2] > 1:
            out = self._reduce_dim(out, len(plan.shape) - 2, "reduce.rest", steps)
        else:
            out = out.squeeze(-2)
        return out.squeeze(-1) if plan.column is None else out.movedim(-1, plan.column)

    def _plan(self, x: torch.Tensor, dim: int) -> _Plan:
        dtype = dtypes.dtype_name(x.dtype)
        shape, strides = x.shape, x.stride()
        kept = [d for d in range(x.dim()) if d != dim]
        adjacent = [d for d in kept if shape[d] >= 8 and 0 < strides[d] < strides[dim]]
        column = min(adjacent, key=lambda d: strides[d], default=None)
        outer = [d for d in kept if d != column]
        segment = reduce_source.SEGMENT if column is None else reduce_source.COLUMN_SEGMENT
        segments = -(-shape[dim] // segment)
        cols = 1 if column is None else shape[column]
        col_blocks = -(-cols // reduce_source.COLUMNS)
        parameters = [len(outer), shape[dim], strides[dim], segment, segments, cols]
        parameters += [0 if column is None else strides[column], col_blocks]
        for d in reversed(outer):
            parameters += [shape[d], strides[d]]
        sizes = [shape[d] for d in outer]
        variant = "rows" if column is None else "columns"
        if variant == "rows" and strides[dim] == 1 and _is_commutative(self._inlined):
            variant = "lanes"
            beyond = x.nbytes > last_level_cache()
            parameters.append(reduce_source.PREFETCH_DISTANCE if beyond else 0)
        items = prod(sizes) * segments * col_blocks
        first = make_pass(self._kernel(variant, dtype), parameters, items, x.numel())
        if variant == "lanes":
            shared = 8 * items if segments > 1 else 0
            first = replace(first, shared=shared, bidirectional=True)
            segments = 1
        position = None if column is None else kept.index(column)
        return _Plan(first, (*sizes, segments, cols), dtypes.computed_dtype(dtype), position)

    def _kernel(self, variant: str, dtype: str) -> Kernel:
        key = variant, dtype
        if key not in self.kernels:
            held = dtypes.ValueType(dtype).computed
            types = dtypes.infer_types(self._inlined, [held, held], type_of_call)
            self._check_result(types, dtype)
            code = ScalarCode(self._inlined, types)
            title = f"{self._name}, {variant} of {dtype}"
            if variant == "scan":
                source = reduce_source.scan_source(code, dtype, title)
            elif variant == "lanes":
                source = reduce_source.lanes_source(code, dtype, title)
            else:
                source = reduce_source.reduce_source(code, dtype, variant == "columns", title)
            self.kernels[key] = compile_kernel(source, self._name, code.calls, f"_{variant}")
        return self.kernels[key]

    def _check_result(self, types: Sequence[dtypes.ValueType], dtype: str) -> None:
        """Refuse a function whose result does not fit into the tensor's dtype."""
        (index,) = self._inlined.outputs
        result = dtypes.result_dtype(types[index], [dtypes.ValueType(dtype)])
        if not torch.can_cast(dtypes.torch_dtype(result), dtypes.torch_dtype(dtype)):
            raise TypeError(
                f"{self._name} of two {dtype} is {result}, and a reduction or scan has the dtype "
                f"of its tensor: convert that to {result} first"
            )


def _is_commutative(expression: Expression) -> bool:
    """True if the function is one commutative op on both arguments."""
    *arguments, last = expression.ops
    return (
        all(op.name == "arg" for op in arguments)
        and expression.outputs == (2,)
        and last.name in _COMMUTATIVE
        and set(last.operands) == {0, 1}
    )


def _groups(x: torch.Tensor, dims: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of adjacent dimensions, from the last to the first: (last, how many)."""
    groups: list[tuple[int, int]] = []
    for dim in sorted(dims, reverse=True):
        if groups and groups[-1][0] - groups[-1][1] == dim:
            last, count = groups.pop()
            groups.append((last, count + 1))
        else:
            groups.append((dim, 1))
    return groups


def _flattened(x: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
    """A view with these dimensions as one; None if their memory does not allow it."""
    try:
        return x.view(*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :])
    except RuntimeError:
        return None


def recurrence(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """h[i] = g[i] + a[i] h[i - 1] along the last dimension of contiguous floats; h[0] = g[0]."""
    out = torch.empty_like(g)
    if g.numel():
        length = g.shape[-1]
        name = dtypes.dtype_name(g.dtype)
        source = reduce_source.recurrence_source(name, f"recurrence of {name}")
        kernel = compile_kernel(source, "recurrence")
        only = make_pass(kernel, (0, length), g.numel() // length, g.numel())
        only.run(a, g, out, nbytes=3 * g.nbytes)
    return out


def _add() -> Expression:
    builder = Builder(2)
    return builder.build(builder.add("add", 0, 1))


SUM = Reducer(_add(), "sum")


def sum_over(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sum over these dimensions; unlike torch's, its bits do not depend on threads."""
    return SUM.reduce(x, dims) if x.numel() else x.sum(dims)
