"""`Vectorized.explain`: compiled kernels, their access patterns, statistics of the last calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from textwrap import indent

from taskgrad.kernels.autograd.operation import Operation
from taskgrad.kernels.ir.expression import format_expression, inlined
from taskgrad.kernels.runtime.kernel_cache import Kernel
from taskgrad.kernels.runtime.reduce import Reducer
from taskgrad.kernels.runtime.thread_team import CallStats


@dataclass(frozen=True)
class KernelRow:
    """One compiled loop.

    `along` shows how each operand was accessed along a row: u unit stride, z one element, s
    strided, t transposed in tiles, p unit stride with non-temporal stores, r, c or b summed over a
    block's rows, columns or both.
    """

    part: str  # ``forward``, a derivative (``pullback(0)``), or the variant of a reduction
    signature: str
    aligned: bool  # True if every operand was contiguous or one number: the fast path
    along: str
    vector_bits: int  # the widest vector registers that it uses; 0 if LLVM did not vectorise it
    compiled_here: bool  # False if the machine code was in the cache
    seconds: float  # that compiling, or loading it, took
    source: str  # the file


@dataclass(frozen=True)
class CallRow:
    """The last call of one part (of a reduction, too); `gb_per_s` is in 1e9 bytes a second."""

    part: str
    threads: int
    blocks: int
    bytes: int
    seconds: float
    gb_per_s: float


@dataclass(frozen=True)
class Explanation:
    """The result of `Vectorized.explain`; prints as text."""

    name: str
    formula: str  # the function's expression, a line an op; if it could not be traced, why
    kernels: tuple[KernelRow, ...]
    calls: tuple[CallRow, ...]

    def __str__(self) -> str:
        parts = [self.name, indent(self.formula, "  ")]
        for title, rows in (("compiled", self.kernels), ("last calls", self.calls)):
            parts += [title, indent(_table(rows), "  ")]
        return "\n".join(parts)

    __repr__ = __str__


def explain(
    operation: Operation, reducer: Reducer | None, name: str, unsupported: str
) -> Explanation:
    """The explanation of an operation, its derivatives and its reductions so far."""
    kernels: list[KernelRow] = []
    calls: list[CallRow] = []
    for part, inner in _parts(operation):
        shown = {}
        for plan in list(inner.launcher.plans.values()):
            shown[plan.signature, plan.aligned, "".join(plan.loops.accesses)] = plan.kernel
        kernels += [_row(part, *known, kernel) for known, kernel in shown.items()]
        if inner.launcher.last is not None:
            calls.append(_call(part, inner.launcher.last))
    if reducer is not None:
        for (variant, dtype), kernel in reducer.kernels.items():
            kernels.append(_row(variant, dtype, variant != "columns", "u", kernel))
        calls += [_call(part, last) for part, last in reducer.last.items()]
    formula = unsupported or format_expression(inlined(operation.expression))
    return Explanation(name, formula, tuple(kernels), tuple(calls))


def _parts(operation: Operation, name: str = "forward") -> Iterator[tuple[str, Operation]]:
    yield name, operation
    for part, inner in list(operation.derivatives.items()):
        yield from _parts(inner, part if name == "forward" else f"{name}.{part}")


def _row(part: str, signature: str, aligned: bool, along: str, kernel: Kernel) -> KernelRow:
    compiled = kernel.vector_bits, kernel.compiled_here, round(kernel.seconds, 3), str(kernel.path)
    return KernelRow(part, signature, aligned, along, *compiled)


def _call(part: str, last: CallStats) -> CallRow:
    rate = round(last.bytes / last.seconds / 1e9, 2)
    return CallRow(part, last.threads, last.items, last.bytes, round(last.seconds, 9), rate)


def _table(rows: tuple[KernelRow, ...] | tuple[CallRow, ...]) -> str:
    if not rows:
        return "nothing yet"
    heading = [f.name for f in fields(rows[0])]
    cells = [[_cell(v) for v in astuple(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [heading, *cells]
    )


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value}"
