"""Calls of a formula on tensors: plans by signature, memory for the results, the kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from taskgrad.kernels.codegen import nontemporal, tiled_transpose
from taskgrad.kernels.codegen.elementwise_source import elementwise_source, scratch_of
from taskgrad.kernels.codegen.loop_nest import Layout, contiguous, layout
from taskgrad.kernels.codegen.numba_typing import kind_of_call, require_numba
from taskgrad.kernels.codegen.scalar_code import Body
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.dtypes import Kind
from taskgrad.kernels.ir.expression import Formula, expanded
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import Kernel, compiled
from taskgrad.kernels.runtime.memory import unreadable
from taskgrad.kernels.runtime.reduce import sum_over

_PLANS = 4_096

Results = Callable[[Sequence[torch.Tensor], Sequence[bool]], list[str]]


@dataclass(frozen=True)
class Plan:
    """All that is decided before a kernel is called, for inputs of one signature."""

    kernel: Kernel
    layout: Layout
    signature: str
    out_dtypes: tuple[torch.dtype, ...]
    made_dtypes: tuple[torch.dtype, ...]  # of what the kernel writes: partial sums are float32
    contiguous: bool
    meta: torch.Tensor
    meta_address: int
    scratch: int
    bytes: int
    alone: bool


class Launcher:
    """Runs one formula.

    Parameters
    ----------
    formula : Formula
    name : str
    results : callable or None
        Gives the dtypes of the outputs for tensors and which of them are weak; without it they are
        what the formula makes of the arguments'.
    """

    def __init__(self, formula: Formula, name: str, results: Results | None = None) -> None:
        self.formula, self.name, self._results = formula, name, results
        self.plans: dict[Any, Plan] = {}
        self.last: thread_team.LastCall | None = None
        self._expanded = expanded(formula)
        self._lock = threading.Lock()

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        weak: tuple[bool, ...] | None = None,
        out: torch.Tensor | None = None,
        sums: tuple[torch.Size | None, ...] = (),
    ) -> list[torch.Tensor]:
        """The outputs, for tensors of the CPU; no gradients.

        Parameters
        ----------
        tensors : sequence of tensors
        weak : tuple of bool or None
            Which of them stand for Python numbers.
        out : tensor or None
            Where to write the one output; of its shape and dtype.
        sums : tuple of (shape or None)
            For each output the shape to which it is summed, as broadcasting back would; those are
            floats. Empty: none is.
        """
        # torch's default dtype is what whole numbers become where a float comes out.
        try:
            key: Any = tuple([(t.dtype, t.shape, t.stride()) for t in tensors])
        except RuntimeError as error:  # no strides
            raise unreadable(self.name, tensors) from error
        key = torch.get_default_dtype(), key
        in_place = False
        if weak is not None or out is not None or sums:
            in_place = out is not None and any(t.data_ptr() == out.data_ptr() for t in tensors)
            key = key, weak, None if out is None else out.stride(), in_place, sums
        plan = self.plans.get(key)
        if plan is None:
            plan = self._plan(tensors, weak, out, in_place, sums)
            with self._lock:
                if len(self.plans) >= _PLANS:
                    self.plans.clear()
                self.plans[key] = plan
        made = plan.layout
        results = _empty(plan) if out is None else [out]
        try:
            addresses = [t.data_ptr() for t in (*tensors, *results)]
        except RuntimeError as error:
            raise unreadable(self.name, tensors) from error
        if 0 in addresses and made.items:
            raise unreadable(self.name, (*tensors, *results))
        start = time.perf_counter()
        count = thread_team.run(
            plan.kernel,
            made.items,
            addresses,
            meta=plan.meta_address,
            scratch=plan.scratch,
            threads=1 if plan.alone else torch.get_num_threads(),
        )
        if sums:
            results = _summed(plan, results)
        seconds = time.perf_counter() - start
        self.last = thread_team.LastCall(count, made.items, plan.bytes, seconds)
        return results

    def dtypes_for(self, tensors: Sequence[torch.Tensor], weak: Sequence[bool]) -> list[str]:
        """The dtypes of the outputs."""
        return self._typed(tensors, weak)[2]

    def _typed(
        self, tensors: Sequence[torch.Tensor], weak: Sequence[bool]
    ) -> tuple[list[str], list[Kind], list[str]]:
        """The dtypes of the arguments, the kinds of the steps, the dtypes of the outputs."""
        inputs = dtypes.input_dtypes(tensors, weak)
        default = dtypes.default_float()
        kinds = dtypes.kinds_of(self._expanded, inputs, default, kind_of_call)
        given = [Kind(name) for name in inputs]
        if self._results is None:
            found = [kinds[place] for place in self._expanded.outputs]
            results = [dtypes.settled(kind, given, default) for kind in found]
        else:
            results = self._results(tensors, weak)
        return inputs, kinds, results

    def _plan(
        self,
        tensors: Sequence[torch.Tensor],
        weak: tuple[bool, ...] | None,
        out: torch.Tensor | None,
        in_place: bool,
        sums: tuple[torch.Size | None, ...],
    ) -> Plan:
        require_numba()
        weak = weak or (False,) * len(tensors)
        _, kinds, results = self._typed(tensors, weak)
        stored = [dtypes.name_of(t.dtype) for t in tensors]
        target = None if out is None else (tuple(out.shape), out.stride())
        operands = [(tuple(t.shape), t.stride()) for t in tensors]
        made = layout(operands, target, len(results), sums)
        stay = [
            name if partial is None else Kind(name).computed
            for name, partial in zip(results, made.partials, strict=True)
        ]
        count = prod(made.shape)
        written = sum(
            dtypes.SIZES[name] * (count if partial is None else prod(partial.shape))
            for name, partial in zip(stay, made.partials, strict=True)
        )
        touched = sum(_distinct(t) * t.element_size() for t in tensors) + written
        if not in_place:  # else its lines are in the caches already
            outputs = list(enumerate(stay, start=len(tensors)))
            letters = nontemporal.past_caches(made.letters, outputs, made.columns, touched)
            if nontemporal.LETTER in letters and tiled_transpose.LETTER in letters:
                made = layout(operands, target, len(results), sums, tiled_transpose.WIDE)
            made = replace(made, letters=letters)
        body = Body(self._expanded, kinds, dtypes.default_float())
        signature = f"({', '.join(stored)}) -> {', '.join(results)}"
        title = f"{self.name}: {signature}, {made.letters}"
        source = elementwise_source(self._expanded, body, kinds, stored, stay, made.letters, title)
        kernel = compiled(source, self.name, body.calls)
        alone = made.items <= 1 or count <= thread_team.ALONE
        dense = not any(made.partials)
        meta = torch.tensor(made.meta, dtype=torch.int64)
        out_dtypes = tuple(dtypes.torch_dtype(name) for name in results)
        return Plan(
            kernel=kernel,
            layout=made,
            signature=signature,
            out_dtypes=out_dtypes,
            made_dtypes=tuple(dtypes.torch_dtype(name) for name in stay),
            contiguous=dense and made.out_strides == contiguous(made.shape),
            meta=meta,
            meta_address=meta.data_ptr(),
            scratch=scratch_of(made.letters),
            bytes=touched,
            alone=alone,
        )


def _empty(plan: Plan) -> list[torch.Tensor]:
    """Memory for what the kernel writes."""
    made = plan.layout
    if plan.contiguous:
        return [torch.empty(made.shape, dtype=d) for d in plan.made_dtypes]
    return [
        torch.empty_strided(made.shape, made.out_strides, dtype=d)
        if partial is None
        else torch.empty(partial.shape, dtype=d)
        for d, partial in zip(plan.made_dtypes, made.partials, strict=True)
    ]


def _summed(plan: Plan, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """The partial sums among the results added up."""
    return [
        result if partial is None else partial.placed(sum_over(result, partial.summed)).to(dtype)
        for result, partial, dtype in zip(
            results, plan.layout.partials, plan.out_dtypes, strict=True
        )
    ]


def _distinct(tensor: torch.Tensor) -> int:
    """Elements in memory: repeated ones count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count
