"""Reductions and scans along one dimension on the CPU; no gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from taskgrad.kernels.codegen import reduce_source
from taskgrad.kernels.codegen.nontemporal import last_cache
from taskgrad.kernels.codegen.numba_typing import kind_of_call
from taskgrad.kernels.codegen.scalar_code import Body
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.expression import Formula, Writer, expanded
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.full_reduce import Repeated, done_from_end, from_end
from taskgrad.kernels.runtime.kernel_cache import Kernel, compiled
from taskgrad.kernels.runtime.memory import unreadable

_PLANS = 4_096
_READY = 16  # reductions that are kept ready; each has memory of its own for every thread
_COMMUTE = {"add", "mul", "and", "or", "xor"}


@dataclass(frozen=True)
class _Pass:
    """One call of a kernel."""

    kernel: Kernel
    meta: torch.Tensor
    meta_address: int
    items: int
    alone: bool
    shared: int = 0  # bytes of memory for segments that the kernel itself joins
    turns: bool = False  # whether it goes by `from_end`

    def run(self, *tensors: torch.Tensor, nbytes: int | None = None) -> thread_team.LastCall:
        """What it did, with tensors of so many bytes together."""
        start = time.perf_counter()
        try:
            addresses = [t.data_ptr() for t in tensors]
        except RuntimeError as error:
            raise unreadable(self.kernel.name, tensors) from error
        if 0 in addresses:
            raise unreadable(self.kernel.name, tensors)
        count = thread_team.run(
            self.kernel,
            self.items,
            addresses,
            meta=self.meta_address,
            scratch=reduce_source.SCRATCH,
            shared=self.shared,
            from_end=self.turns and from_end(tensors[0].data_ptr()),
            threads=1 if self.alone else torch.get_num_threads(),
        )
        seconds = time.perf_counter() - start
        if self.turns:
            done_from_end()
        nbytes = sum(t.nbytes for t in tensors) if nbytes is None else nbytes
        return thread_team.LastCall(count, self.items, nbytes, seconds)


def _pass(kernel: Kernel, numbers: Sequence[int], items: int, elements: int) -> _Pass:
    meta = torch.tensor(numbers, dtype=torch.int64)
    return _Pass(kernel, meta, meta.data_ptr(), items, items <= 1 or elements <= thread_team.ALONE)


@dataclass(frozen=True)
class _Step:
    """A pass of a reduction, and the tensor that it makes from the one before."""

    part: str
    only: _Pass
    shape: Sequence[int]
    dtype: torch.dtype
    nbytes: int
    last: dict[str, thread_team.LastCall]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.last[self.part] = self.only.run(x, out, nbytes=self.nbytes)
        return out


@dataclass(frozen=True)
class _Plan:
    """A reduction of one dimension: its first pass, and where the results belong."""

    first: _Pass
    shape: tuple[int, ...]  # of the first pass's results: outer dimensions, segments, columns
    dtype: torch.dtype
    moves: int | None  # where the columns go


class Folder:
    """Reduces and scans with one function.

    Parameters
    ----------
    formula : Formula
        Of two arguments.
    name : str
    """

    def __init__(self, formula: Formula, name: str) -> None:
        self._formula, self._name = expanded(formula), name
        self._plans: dict[Any, _Plan] = {}
        self._steps: dict[Any, Sequence[_Step | Repeated]] = {}
        self._again: dict[Any, Sequence[_Step | Repeated]] = {}
        self._ready = 0
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self.last: dict[str, thread_team.LastCall] = {}

    def again(self, x: torch.Tensor, dim: int | None) -> torch.Tensor | None:
        """As `fold` over one dimension or all, if that was done before and is passes alone.

        Nothing else is looked at: small calls are mostly this, and so are large ones whose elements
        have pushed everything else out of the caches.
        """
        key = x.dtype, x.shape, x.stride(), dim
        steps = self._again.get(key)
        if steps is None:
            rank = x.dim()
            if dim is not None and not -rank <= dim < rank:
                return None
            dims = tuple(range(rank)) if dim is None else (dim % rank,)
            steps = self._steps.get((*key[:3], dims))
            if steps is None:
                return None
            self._again[key] = steps
        for step in steps:
            x = step.run(x)
        return x

    def fold(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """The reduction over some dimensions, without them; none of them is empty."""
        if not dims:
            return x.clone()
        steps: list[_Step] = []
        result, part = x, "reduce"
        for last, count in _groups(x, dims):
            first = last - count + 1
            joined = result if count == 1 else _flattened(result, first, last)
            if joined is not None:
                result = self._fold_one(joined, first, part, steps)
            else:
                for dim in range(last, first - 1, -1):
                    result, part = self._fold_one(result, dim, part, steps), "reduce.rest"
            part = "reduce.rest"
        if steps and result.dtype == x.dtype and result.is_contiguous() and result.numel():
            self._keep((x.dtype, x.shape, x.stride(), dims), steps, result.shape)
        return result.to(x.dtype)

    def _keep(self, key: Any, steps: Sequence[_Step], shape: torch.Size) -> None:
        """Keep these steps, to be done again; their result has this shape."""
        if key in self._steps:  # `fold` is also called for what `again` does not do
            return
        if len(self._steps) >= _PLANS:
            self._steps.clear()
            self._again.clear()
            self._ready = 0
        *before, end = steps
        only = end.only
        if before or shape or not only.turns or self._ready == _READY:
            self._steps[key] = [*before, replace(end, shape=shape)]
            return
        self._ready += 1
        repeated = Repeated(
            self.last,
            end.part,
            only.kernel,
            only.items,
            only.meta,
            end.dtype,
            end.nbytes,
            alone=only.alone,
            scratch=reduce_source.SCRATCH,
            shared=only.shared,
        )
        self._steps[key] = [repeated]

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
            totals = self._totals(x.view(rows, length), segment)
            before = self.scan(totals)
        out = torch.empty_like(x)
        kernel = self._kernel("scan", dtypes.name_of(x.dtype))
        numbers = (0, length, 1, segment, segments)
        chosen = _pass(kernel, numbers, rows * segments, x.numel())
        self.last["scan"] = chosen.run(x, before, out)
        return out

    def _totals(self, x: torch.Tensor, segment: int) -> torch.Tensor:
        rows, length = x.shape
        segments = -(-length // segment)
        kernel = self._kernel("rows", dtypes.name_of(x.dtype))
        numbers = (1, length, 1, segment, segments, 1, 0, 1, rows, length)
        held = dtypes.Kind(dtypes.name_of(x.dtype)).computed
        out = torch.empty(rows, segments, dtype=dtypes.torch_dtype(held))
        chosen = _pass(kernel, numbers, rows * segments, x.numel())
        self.last["scan.totals"] = chosen.run(x, out)
        return out

    def _fold_one(self, x: torch.Tensor, dim: int, part: str, steps: list[_Step]) -> torch.Tensor:
        key = x.dtype, x.shape, x.stride(), dim
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(x, dim)
        out = torch.empty(plan.shape, dtype=plan.dtype)
        if out.numel():
            self.last[part] = plan.first.run(x, out)
            nbytes = x.nbytes + out.nbytes
            steps.append(_Step(part, plan.first, plan.shape, plan.dtype, nbytes, self.last))
        if plan.shape[-2] > 1:
            out = self._fold_one(out, len(plan.shape) - 2, "reduce.rest", steps)
        else:
            out = out.squeeze(-2)
        return out.squeeze(-1) if plan.moves is None else out.movedim(-1, plan.moves)

    def _plan(self, x: torch.Tensor, dim: int) -> _Plan:
        dtype = dtypes.name_of(x.dtype)
        shape, strides = x.shape, x.stride()
        kept = [d for d in range(x.dim()) if d != dim]
        beside = [d for d in kept if shape[d] >= 8 and 0 < strides[d] < strides[dim]]
        column = min(beside, key=lambda d: strides[d], default=None)
        outer = [d for d in kept if d != column]
        segment = reduce_source.SEGMENT if column is None else reduce_source.COLUMN_SEGMENT
        segments = -(-shape[dim] // segment)
        cols = 1 if column is None else shape[column]
        col_blocks = -(-cols // reduce_source.COLUMNS)
        numbers = [len(outer), shape[dim], strides[dim], segment, segments, cols]
        numbers += [0 if column is None else strides[column], col_blocks]
        for d in reversed(outer):
            numbers += [shape[d], strides[d]]
        sizes = [shape[d] for d in outer]
        way = "rows" if column is None else "columns"
        if way == "rows" and strides[dim] == 1 and _commutes(self._formula):
            way = "lanes"
            numbers.append(reduce_source.AHEAD if x.nbytes > last_cache() else 0)
        kernel = self._kernel(way, dtype)
        items = prod(sizes) * segments * col_blocks
        moves = None if column is None else kept.index(column)
        held = dtypes.torch_dtype(dtypes.Kind(dtype).computed)
        first = _pass(kernel, numbers, items, x.numel())
        if way == "lanes":
            first = replace(first, shared=8 * items if segments > 1 else 0, turns=True)
            segments = 1
        return _Plan(first, (*sizes, segments, cols), held, moves)

    def _kernel(self, way: str, dtype: str) -> Kernel:
        key = way, dtype
        if key not in self.kernels:
            default = dtypes.default_float()
            held = dtypes.Kind(dtype).computed
            kinds = dtypes.kinds_of(self._formula, [held, held], default, kind_of_call)
            self._check_result(kinds, dtype)
            body = Body(self._formula, kinds, default)
            title = f"{self._name}, {way} of {dtype}"
            if way == "scan":
                source = reduce_source.scan_source(body, dtype, title)
            elif way == "lanes":
                source = reduce_source.lanes_source(body, dtype, title)
            else:
                source = reduce_source.fold_source(body, dtype, way == "columns", title)
            self.kernels[key] = compiled(source, self._name, body.calls, f"_{way}")
        return self.kernels[key]

    def _check_result(self, kinds: Sequence[dtypes.Kind], dtype: str) -> None:
        """Refuse a function whose result the tensor's dtype would cut off."""
        (place,) = self._formula.outputs
        default = dtypes.default_float()
        result = dtypes.settled(kinds[place], [dtypes.Kind(dtype)], default)
        if not torch.can_cast(dtypes.torch_dtype(result), dtypes.torch_dtype(dtype)):
            raise TypeError(
                f"{self._name} of two {dtype} is {result}, and a reduction or scan has the dtype "
                f"of its tensor: convert that to {result} first"
            )


def _commutes(formula: Formula) -> bool:
    """Whether it is known to: it is one operation on both arguments that does."""
    *arguments, last = formula.steps
    return (
        all(step.op == "arg" for step in arguments)
        and formula.outputs == (2,)
        and last.op in _COMMUTE
        and set(last.operands) == {0, 1}
    )


def _groups(x: torch.Tensor, dims: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring dimensions, from the last to the first: (last, how many)."""
    groups: list[tuple[int, int]] = []
    for dim in sorted(dims, reverse=True):
        if groups and groups[-1][0] - groups[-1][1] == dim:
            last, count = groups.pop()
            groups.append((last, count + 1))
        else:
            groups.append((dim, 1))
    return groups


def _flattened(x: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
    """The same memory with these dimensions as one; None where they do not lie in one row."""
    try:
        return x.view(*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :])
    except RuntimeError:
        return None


def recurrence(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """h[i] = g[i] + a[i] h[i - 1] along the last dimension of contiguous floats; h[0] = g[0]."""
    out = torch.empty_like(g)
    if g.numel():
        length = g.shape[-1]
        name = dtypes.name_of(g.dtype)
        source = reduce_source.recurrence_source(name, f"recurrence of {name}")
        kernel = compiled(source, "recurrence")
        _pass(kernel, (0, length), g.numel() // length, g.numel()).run(a, g, out)
    return out


def _add() -> Formula:
    writer = Writer(2)
    place = writer.add("add", 0, 1)
    return Formula(2, tuple(writer.steps), (place,))


_folder = Folder(_add(), "sum")


def sum_over(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sum over these dimensions, without them; no gradients."""
    return _folder.fold(x, dims) if x.numel() else x.sum(dims)
