"""Launches of elementwise kernels on CPU tensors: a plan for each signature, results, the call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from taskgrad.kernels.codegen import tiled_transpose
from taskgrad.kernels.codegen.access import Access
from taskgrad.kernels.codegen.elementwise_source import elementwise_source, scratch_bytes
from taskgrad.kernels.codegen.loop_nest import LoopNest, contiguous, loop_nest
from taskgrad.kernels.codegen.nontemporal import with_nontemporal
from taskgrad.kernels.codegen.numba_typing import require_numba, type_of_call
from taskgrad.kernels.codegen.scalar_code import ScalarCode
from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.dtypes import ValueType
from taskgrad.kernels.ir.expression import Expression, inlined
from taskgrad.kernels.runtime import thread_team
from taskgrad.kernels.runtime.kernel_cache import Kernel, compile_kernel
from taskgrad.kernels.runtime.memory import unreadable
from taskgrad.kernels.runtime.reduce import sum_over

_PLANS = 4_096

Results = Callable[[Sequence[torch.Tensor], Sequence[bool]], list[str]]


@dataclass(frozen=True)
class LaunchPlan:
    """Everything about a launch that depends only on the signature of the inputs."""

    kernel: Kernel
    loops: LoopNest
    signature: str
    out_dtypes: tuple[torch.dtype, ...]
    kernel_dtypes: tuple[torch.dtype, ...]  # of what it writes: partial sums of halves are float32
    contiguous: bool  # all results are, and none is summed
    meta: torch.Tensor
    meta_address: int
    scratch: int
    bytes: int
    one_thread: bool

    @property
    def aligned(self) -> bool:
        """True if every operand is contiguous or one number."""
        fast = {Access.UNIT, Access.SCALAR, Access.NONTEMPORAL}
        return self.loops.rows == 1 and fast.issuperset(self.loops.accesses)


class Launcher:
    """Launches one expression.

    `results` returns the dtypes of the outputs, for tensors and which of them are weak; without it
    they are inferred from the expression.
    """

    def __init__(self, expression: Expression, name: str, results: Results | None = None) -> None:
        self.name, self._results = name, results
        self.plans: dict[Any, LaunchPlan] = {}
        self.last: thread_team.CallStats | None = None
        self._inlined = inlined(expression)
        self._lock = threading.Lock()

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        weak: tuple[bool, ...] | None = None,
        out: torch.Tensor | None = None,
        sums: tuple[torch.Size | None, ...] = (),
    ) -> list[torch.Tensor]:
        """The outputs, for CPU tensors, of which the `weak` ones are Python numbers; no gradients.

        `out` is for the only output, with its shape and dtype. `sums` has for each output the shape
        to which it is summed (the reverse of broadcasting), floats only; empty: none is.
        """
        try:
            key: Any = tuple([(t.dtype, t.shape, t.stride()) for t in tensors])
        except RuntimeError as error:  # it has no strides
            raise unreadable(self.name, tensors) from error
        key = torch.get_default_dtype(), key  # which float functions of integers have
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
        items = plan.loops.items
        results = _allocate(plan) if out is None else [out]
        try:
            addresses = [t.data_ptr() for t in (*tensors, *results)]
        except RuntimeError as error:
            raise unreadable(self.name, tensors) from error
        if 0 in addresses and items:
            raise unreadable(self.name, (*tensors, *results))
        start = time.perf_counter()
        count = thread_team.run(
            plan.kernel,
            items,
            addresses,
            meta=plan.meta_address,
            scratch=plan.scratch,
            threads=1 if plan.one_thread else torch.get_num_threads(),
        )
        if sums:
            results = _add_partials(plan, results)
        seconds = time.perf_counter() - start
        self.last = thread_team.CallStats(count, items, plan.bytes, seconds)
        return results

    def dtypes_for(self, tensors: Sequence[torch.Tensor], weak: Sequence[bool]) -> list[str]:
        """The dtypes of the outputs."""
        return self._infer(tensors, weak)[1]

    def _infer(
        self, tensors: Sequence[torch.Tensor], weak: Sequence[bool]
    ) -> tuple[list[ValueType], list[str]]:
        """The types of the ops, the dtypes of the outputs."""
        inputs = dtypes.input_dtypes(tensors, weak)
        types = dtypes.infer_types(self._inlined, inputs, type_of_call)
        if self._results is not None:
            return types, self._results(tensors, weak)
        given = [ValueType(name) for name in inputs]
        return types, [dtypes.result_dtype(types[i], given) for i in self._inlined.outputs]

    def _plan(
        self,
        tensors: Sequence[torch.Tensor],
        weak: tuple[bool, ...] | None,
        out: torch.Tensor | None,
        in_place: bool,
        sums: tuple[torch.Size | None, ...],
    ) -> LaunchPlan:
        require_numba()
        types, results = self._infer(tensors, weak or (False,) * len(tensors))
        inputs = [dtypes.dtype_name(t.dtype) for t in tensors]
        target = None if out is None else (tuple(out.shape), out.stride())
        operands = [(tuple(t.shape), t.stride()) for t in tensors]
        loops = loop_nest(operands, target, len(results), sums)
        outputs = [
            name if partial is None else ValueType(name).computed
            for name, partial in zip(results, loops.partials, strict=True)
        ]
        count = prod(loops.shape)
        written = sum(
            dtypes.SIZES[name] * (count if partial is None else prod(partial.shape))
            for name, partial in zip(outputs, loops.partials, strict=True)
        )
        touched = sum(_distinct(t) * t.element_size() for t in tensors) + written
        if not in_place:  # then the output's lines are in the caches
            stored = list(enumerate(outputs, start=len(tensors)))
            accesses = with_nontemporal(loops.accesses, stored, loops.columns, touched)
            if Access.NONTEMPORAL in accesses and Access.TRANSPOSED in accesses:
                wide = tiled_transpose.NONTEMPORAL_COLUMNS
                loops = loop_nest(operands, target, len(results), sums, wide)
            loops = replace(loops, accesses=accesses)
        code = ScalarCode(self._inlined, types)
        signature = f"({', '.join(inputs)}) -> {', '.join(results)}"
        title = f"{self.name}: {signature}, {''.join(loops.accesses)}"
        source = elementwise_source(code, inputs, outputs, loops.accesses, title)
        dense = not any(loops.partials) and loops.out_strides == contiguous(loops.shape)
        meta = torch.tensor(loops.meta, dtype=torch.int64)
        return LaunchPlan(
            kernel=compile_kernel(source, self.name, code.calls),
            loops=loops,
            signature=signature,
            out_dtypes=tuple(dtypes.torch_dtype(name) for name in results),
            kernel_dtypes=tuple(dtypes.torch_dtype(name) for name in outputs),
            contiguous=dense,
            meta=meta,
            meta_address=meta.data_ptr(),
            scratch=scratch_bytes(loops.accesses),
            bytes=touched,
            one_thread=loops.items <= 1 or count <= thread_team.ONE_THREAD,
        )


def _allocate(plan: LaunchPlan) -> list[torch.Tensor]:
    """Uninitialized tensors for the kernel's outputs."""
    loops = plan.loops
    if plan.contiguous:
        return [torch.empty(loops.shape, dtype=d) for d in plan.kernel_dtypes]
    return [
        torch.empty_strided(loops.shape, loops.out_strides, dtype=d)
        if partial is None
        else torch.empty(partial.shape, dtype=d)
        for d, partial in zip(plan.kernel_dtypes, loops.partials, strict=True)
    ]


def _add_partials(plan: LaunchPlan, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results, partial sums reduced."""
    return [
        result if partial is None else partial.to_output(sum_over(result, partial.summed)).to(dtype)
        for result, partial, dtype in zip(
            results, plan.loops.partials, plan.out_dtypes, strict=True
        )
    ]


def _distinct(tensor: torch.Tensor) -> int:
    """Elements in memory; broadcast ones count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count
