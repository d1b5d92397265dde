"""What was compiled for a function, how its last calls went through memory, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

from taskgrad.kernels.autograd.operation import Operation
from taskgrad.kernels.ir.expression import expanded, text_of
from taskgrad.kernels.runtime.launch import Plan
from taskgrad.kernels.runtime.reduce import Folder
from taskgrad.kernels.runtime.thread_team import LastCall


@dataclass(frozen=True)
class KernelRow:
    """One compiled loop.

    Attributes
    ----------
    part : str
        ``forward``, a derivative (``pullback(0)``), or the way of a reduction.
    signature : str
    aligned : bool
        Whether every operand lay in one row, or was one number: the fast path.
    along : str
        How the operands lay along the loop: u unit stride, z one element, s strided, t turned
        round in blocks first, p a result of unit stride that goes past the caches.
    vector_bits : int
        The widest registers of the loop as LLVM vectorised it; 0 where it did not.
    compiled_here : bool
        False where the machine code was on disk already.
    seconds : float
        That compiling, or loading it, took.
    source : str
        The file.
    """

    part: str
    signature: str
    aligned: bool
    along: str
    vector_bits: int
    compiled_here: bool
    seconds: float
    source: str


@dataclass(frozen=True)
class CallRow:
    """The last call of one part, reductions and scans too; `gb_per_s` is 1e9 bytes a second."""

    part: str
    threads: int
    blocks: int
    bytes: int
    seconds: float
    gb_per_s: float


@dataclass(frozen=True)
class Explanation:
    """What `Vectorized.explain` gives; prints as text.

    Attributes
    ----------
    name : str
    formula : str
        What was read of the function, a line a step; where it could not be read, why.
    kernels : tuple of KernelRow
    calls : tuple of CallRow
    """

    name: str
    formula: str
    kernels: tuple[KernelRow, ...]
    calls: tuple[CallRow, ...]

    def __str__(self) -> str:
        parts = [self.name, _indented(self.formula)]
        for title, rows in (("compiled", self.kernels), ("last calls", self.calls)):
            parts += [title, _indented(_table(rows))]
        return "\n".join(parts)

    __repr__ = __str__


def explain(operation: Operation, folder: Folder | None, name: str, obstacle: str) -> Explanation:
    """The explanation of an operation, its derivatives and its reductions so far."""
    kernels: list[KernelRow] = []
    calls: list[CallRow] = []
    for part, inner in _parts(operation):
        shown = {}
        for plan in list(inner.launcher.plans.values()):
            shown[plan.signature, plan.layout.letters, _aligned(plan)] = plan
        kernels += [_row(part, plan) for plan in shown.values()]
        if inner.launcher.last is not None:
            calls.append(_call(part, inner.launcher.last))
    for (way, dtype), kernel in (folder.kernels if folder else {}).items():
        bits, here, seconds = kernel.vector_bits, kernel.compiled_here, kernel.seconds
        kernels.append(
            KernelRow(way, dtype, way != "columns", "u", bits, here, seconds, str(kernel.path))
        )
    calls += [_call(way, last) for way, last in (folder.last if folder else {}).items()]
    formula = obstacle or text_of(expanded(operation.formula))
    return Explanation(name, formula, tuple(kernels), tuple(calls))


def _parts(operation: Operation, name: str = "forward") -> Iterator[tuple[str, Operation]]:
    yield name, operation
    for part, inner in list(operation.derivatives.items()):
        yield from _parts(inner, part if name == "forward" else f"{name}.{part}")


def _aligned(plan: Plan) -> bool:
    rows = plan.layout.meta[1]
    return rows == 1 and set(plan.layout.letters) <= {"u", "z", "p"}


def _row(part: str, plan: Plan) -> KernelRow:
    kernel = plan.kernel
    return KernelRow(
        part,
        plan.signature,
        _aligned(plan),
        plan.layout.letters,
        kernel.vector_bits,
        kernel.compiled_here,
        round(kernel.seconds, 3),
        str(kernel.path),
    )


def _call(part: str, last: LastCall) -> CallRow:
    rate = round(last.bytes / last.seconds / 1e9, 2)
    return CallRow(part, last.threads, last.items, last.bytes, round(last.seconds, 9), rate)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


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
