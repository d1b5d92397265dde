"""Calls of a formula on tensors: plans by signature, memory for the results, the kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.kernels import dtypes, threads
from taskgrad.kernels.body import Body
from taskgrad.kernels.compiled import Kernel, compiled, require_numba
from taskgrad.kernels.dtypes import Kind
from taskgrad.kernels.formula import Formula, Step, expanded
from taskgrad.kernels.layout import Layout, contiguous, layout
from taskgrad.kernels.source import elementwise_source, slot_size

_PLANS = 4_096

Results = Callable[[Sequence[torch.Tensor], Sequence[bool]], list[str]]


@dataclass(frozen=True)
class Plan:
    """All that is decided before a kernel is called, for inputs of one signature."""

    kernel: Kernel
    layout: Layout
    signature: str
    out_dtypes: tuple[torch.dtype, ...]
    contiguous: bool
    meta: torch.Tensor
    meta_address: int
    slots: int
    bytes: int
    alone: bool


@dataclass
class LastCall:
    """What the last call did, for `explain`."""

    plan: Plan
    threads: int
    seconds: float


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
        self.last: LastCall | None = None
        self._expanded = expanded(formula)
        self._lock = threading.Lock()

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        weak: tuple[bool, ...] | None = None,
        out: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The outputs, for tensors of the CPU; no gradients.

        Parameters
        ----------
        tensors : sequence of tensors
        weak : tuple of bool or None
            Which of them stand for Python numbers.
        out : tensor or None
            Where to write the one output; of its shape and dtype.
        """
        # torch's default dtype is what whole numbers become where a float comes out.
        key: Any = tuple([(t.dtype, t.shape, t.stride()) for t in tensors])
        key = torch.get_default_dtype(), key
        if weak is not None or out is not None:
            key = key, weak, None if out is None else out.stride()
        plan = self.plans.get(key)
        if plan is None:
            plan = self._plan(tensors, weak, out)
            with self._lock:
                if len(self.plans) >= _PLANS:
                    self.plans.clear()
                self.plans[key] = plan
        made = plan.layout
        if out is not None:
            results = [out]
        elif plan.contiguous:
            results = [torch.empty(made.shape, dtype=d) for d in plan.out_dtypes]
        else:
            results = [
                torch.empty_strided(made.shape, made.out_strides, dtype=d) for d in plan.out_dtypes
            ]
        try:
            addresses = [t.data_ptr() for t in (*tensors, *results)]
        except RuntimeError as error:  # a tensor that only stands for others
            raise RuntimeError(
                f"{self.name} got a tensor without memory of its own, as is_grads_batched=True "
                "makes them: use torch.func.vmap, jacrev or jacfwd"
            ) from error
        start = time.perf_counter()
        count = 1
        if plan.alone:
            if made.items:
                place = threads.scratch(plan.slots) if plan.slots else 0
                plan.kernel.run(plan.meta_address, place, 0, made.items, *addresses)
        else:
            count = self._share(plan, addresses)
        self.last = LastCall(plan, count, time.perf_counter() - start)
        return results

    @staticmethod
    def _share(plan: Plan, addresses: list[int]) -> int:
        def run(start: int, stop: int) -> None:
            place = threads.scratch(plan.slots) if plan.slots else 0
            plan.kernel.run(plan.meta_address, place, start, stop, *addresses)

        return threads.share(run, plan.layout.items, torch.get_num_threads())

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
    ) -> Plan:
        require_numba()
        weak = weak or (False,) * len(tensors)
        _, kinds, results = self._typed(tensors, weak)
        stored = [dtypes.name_of(t.dtype) for t in tensors]
        target = None if out is None else (tuple(out.shape), out.stride())
        made = layout([(tuple(t.shape), t.stride()) for t in tensors], target, len(results))
        body = Body(self._expanded, kinds, dtypes.default_float())
        signature = f"({', '.join(stored)}) -> {', '.join(results)}"
        title = f"{self.name}: {signature}, {made.letters}"
        source = elementwise_source(
            self._expanded, body, kinds, stored, results, made.letters, title
        )
        kernel = compiled(source, self.name, 4 + len(made.letters), body.calls)
        count = 1
        for size in made.shape:
            count *= size
        sizes = [dtypes.SIZES[name] for name in results]
        alone = made.items <= 1 or count <= threads.ALONE
        meta = torch.tensor(made.meta, dtype=torch.int64)
        out_dtypes = tuple(dtypes.torch_dtype(name) for name in results)
        read = sum(_distinct(t) * t.element_size() for t in tensors)
        return Plan(
            kernel=kernel,
            layout=made,
            signature=signature,
            out_dtypes=out_dtypes,
            contiguous=made.out_strides == contiguous(made.shape),
            meta=meta,
            meta_address=meta.data_ptr(),
            slots=made.letters.count("t") * slot_size(),
            bytes=read + count * sum(sizes),
            alone=alone,
        )


def _distinct(tensor: torch.Tensor) -> int:
    """Elements in memory: repeated ones count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def kind_of_call(step: Step, operands: list[Kind]) -> Kind:
    """What Numba finds a function without a formula to give."""
    numba = require_numba()
    function, which = step.value
    signature = tuple(getattr(numba.types, _numba_name(kind)) for kind in operands)
    dispatcher = numba.njit(error_model="numpy")(function.plain)
    try:
        dispatcher.compile(signature)
    except numba.core.errors.NumbaError as error:
        raise TypeError(
            f"{function.name} can be neither read as a formula ({function.obstacle}) "
            f"nor compiled by Numba: {error}"
        ) from error
    found = dispatcher.overloads[signature].signature.return_type
    if which is not None:
        found = found[which]
    name = str(getattr(found, "literal_type", found))
    floats = [k for k in operands if k.is_float]
    if name == "bool":
        return Kind("bool")
    if not name.startswith("float"):
        return Kind(name if name in dtypes.SIZES else "int64")
    # Numba computes with Python's floats in float64; as in torch, they do not widen a float32.
    joined = floats[0] if floats else Kind(dtypes.default_float())
    for kind in floats[1:]:
        joined = dtypes.promote(joined, kind, dtypes.default_float())
    return joined


def _numba_name(kind: Kind) -> str:
    return "boolean" if kind.dtype == "bool" else kind.computed
