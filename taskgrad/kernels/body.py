"""The steps of a formula as typed lines of Python that Numba compiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from taskgrad.kernels.dtypes import Kind, promote
from taskgrad.kernels.formula import ARITHMETIC, BINARY, BITWISE, COMPARISONS, UNARY, Formula, Step

# Those that Numba would call once an element, and that scalar_math has in a form without calls.
VECTORISED = {
    *(f"{name}_{kind}" for name in ("exp", "expm1", "log", "log1p", "tanh")
      for kind in ("float32", "float64")),
    "erf_float32",
}  # fmt: skip
_ROUNDING = ("floor", "ceil", "trunc", "rint")
_NUMPY = ("cbrt", "exp2")
_LONGEST_POWER = 16


class Body:
    """Writes a formula's lines.

    Parameters
    ----------
    formula : Formula
        Expanded: its calls are of functions without a formula.
    kinds : sequence of Kind
        Of its steps.
    default : str
        The dtype of floats that come from whole numbers.

    Attributes
    ----------
    calls : list of Function
        What the lines call as ``call0``, ``call1``, ...
    """

    def __init__(self, formula: Formula, kinds: Sequence[Kind], default: str) -> None:
        self._formula, self._kinds, self._default = formula, kinds, default
        self.calls: list[Any] = []

    def lines(self) -> list[str]:
        """A line for each step that is neither an argument (``a0``, ...) nor a constant."""
        steps = enumerate(self._formula.steps)
        return [
            f"v{i} = {self._expression(i, step)}"
            for i, step in steps
            if step.op not in ("arg", "const")
        ]

    def result(self, k: int, dtype: str) -> str:
        """Output k, as the dtype in which it is stored."""
        return self._as(self._formula.outputs[k], Kind(dtype).computed)

    def _as(self, place: int, dtype: str) -> str:
        step, kind = self._formula.steps[place], self._kinds[place]
        if step.op == "const":
            return _literal(step.value, dtype)
        name = f"a{step.value}" if step.op == "arg" else f"v{place}"
        return cast(name, kind.computed, dtype)

    def _expression(self, i: int, step: Step) -> str:
        op, own = step.op, self._kinds[i].computed
        if op in COMPARISONS:
            a, b = self._alike(step)
            return f"{a} {COMPARISONS[op]} {b}"
        if op == "select":
            condition = self._as(step.operands[0], "bool")
            a, b = (self._as(j, own) for j in step.operands[1:])
            return f"({a} if {condition} else {b})"
        if op == "call":
            return self._call(step)
        if op in ("isnan", "isinf", "isfinite"):
            x = self._as(step.operands[0], self._float_of(step.operands[0]))
            tests = {"isnan": f"{x} != {x}", "isinf": f"abs({x}) == inf"}
            return tests.get(op, f"abs({x}) < inf")
        if op == "zero":
            return f"{own}(0)"
        operands = [self._as(j, own) for j in step.operands]
        if op == "pow":
            return self._power(step, own, *operands)
        return _operation(op, own, operands)

    def _alike(self, step: Step) -> list[str]:
        a, b = (self._kinds[j] for j in step.operands)
        kind = promote(a, b, self._default)
        return [self._as(j, kind.computed) for j in step.operands]

    def _float_of(self, place: int) -> str:
        kind = self._kinds[place]
        return kind.computed if kind.is_float else self._default

    def _call(self, step: Step) -> str:
        function, which = step.value
        if function not in self.calls:
            self.calls.append(function)
        arguments = ", ".join(self._as(j, self._kinds[j].computed) for j in step.operands)
        part = "" if which is None else f"[{which}]"
        return f"call{self.calls.index(function)}({arguments}){part}"

    def _power(self, step: Step, own: str, x: str, y: str) -> str:
        exponent = self._formula.steps[step.operands[1]]
        n = exponent.value if exponent.op == "const" else None
        if n is None or n != int(n) or not 1 <= n <= _LONGEST_POWER:
            return f"{own}({x} ** {y})"
        # By squaring: x**5 is x (x x)(x x), with no call.
        return f"{own}({_product(x, int(n), own)})"


def _product(x: str, n: int, own: str) -> str:
    if n == 1:
        return x
    half = _product(x, n // 2, own)
    square = f"{own}({half} * {half})"
    return square if n % 2 == 0 else f"{own}({square} * {x})"


def _operation(op: str, own: str, operands: list[str]) -> str:
    x, y = operands[0], operands[-1]
    if op in ARITHMETIC:
        return f"{own}({x} {ARITHMETIC[op]} {y})"
    if op == "truediv":
        return f"{own}({x} / {y})"
    if op in BITWISE:
        return f"({x} {BITWISE[op]} {y})" if own == "bool" else f"{own}({x} {BITWISE[op]} {y})"
    if op == "invert":
        return f"(not {x})" if own == "bool" else f"{own}(~{x})"
    if op == "neg":
        return f"{own}(-{x})"
    if op == "abs":
        return f"{own}(abs({x}))"
    if op == "sign":
        return f"({own}(1) if {x} > {own}(0) else ({own}(-1) if {x} < {own}(0) else {own}(0)))"
    if op in ("float", "int"):
        return x
    if op in _ROUNDING:
        return f"m.{op}({x})"
    if f"{op}_{own}" in VECTORISED:
        return f"s.{op}_{own}({x})"
    if op in UNARY or op in BINARY:
        home = "np" if op in _NUMPY else "math"
        return f"{own}({home}.{op}({', '.join(operands)}))"
    raise AssertionError(op)


def cast(name: str, held: str, wanted: str) -> str:
    """A value of one computed dtype as another."""
    if held == wanted:
        return name
    return f"({name} != 0)" if wanted == "bool" else f"{wanted}({name})"


def _literal(value: float, dtype: str) -> str:
    if dtype == "bool":
        return repr(bool(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f"{dtype}({'nan' if math.isnan(value) else 'inf' if value > 0 else '-inf'})"
    return f"{dtype}({value!r})"
