"""The steps of a formula as typed lines of Python that Numba compiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from taskgrad.kernels.codegen.numba_typing import argument_dtype
from taskgrad.kernels.ir.dtypes import SIZES, Kind, promote
from taskgrad.kernels.ir.expression import (
    ARITHMETIC,
    BINARY,
    BITWISE,
    COMPARISONS,
    EXTREMES,
    ROUNDING,
    UNARY,
    Formula,
    Step,
)

# Those that Numba would call once an element, and that scalar_math has in a form without calls.
VECTORISED = {
    *(f"{name}_{kind}" for name in ("exp", "expm1", "log", "log1p", "tanh")
      for kind in ("float32", "float64")),
    "erf_float32",
}  # fmt: skip
_NUMPY = ("cbrt", "exp2")
_LONGEST_POWER = 16
_DIVISIONS = ("floordiv", "mod", "fmod")


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

    def zero_division(self) -> tuple[list[str], str]:
        """Lines, and what is true after them where an integer is divided by 0; empty if nowhere.

        Only divisions count that the result depends on, through the branches that are taken.
        """
        steps = self._formula.steps
        risky: set[int] = set()
        above: set[int] = set()
        for i, step in enumerate(steps):
            if self._divides_integers(i, step):
                risky.add(i)
            if i in risky or above.intersection(step.operands):
                above.add(i)
        lines: list[str] = []
        found: list[str] = []
        live = dict.fromkeys(self._formula.outputs, "True")
        for i in sorted(above, reverse=True):
            where = live.get(i)
            if where is None:
                continue
            if where != "True":
                lines.append(f"w{i} = {where}")
                where = f"w{i}"
            step = steps[i]
            conditions = [where] * len(step.operands)
            if i in risky:
                found.append(_both(where, f"({self._as(step.operands[1], 'int64')} == 0)"))
            if step.op == "select":
                condition = self._as(step.operands[0], "bool")
                conditions[1:] = _both(where, condition), _both(where, f"(not {condition})")
            for place, condition in zip(step.operands, conditions, strict=True):
                known = live.get(place)
                live[place] = condition if known is None else _either(known, condition)
        return lines, " | ".join(found)

    def _divides_integers(self, i: int, step: Step) -> bool:
        if step.op not in _DIVISIONS or self._kinds[i].is_float:
            return False
        divisor = self._formula.steps[step.operands[1]]
        return divisor.op != "const" or divisor.value == 0

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
        arguments = ", ".join(self._as(j, argument_dtype(self._kinds[j])) for j in step.operands)
        part = "" if which is None else f"[{which}]"
        return f"call{self.calls.index(function)}({arguments}){part}"

    def _power(self, step: Step, own: str, x: str, y: str) -> str:
        exponent = self._formula.steps[step.operands[1]]
        n = exponent.value if exponent.op == "const" else math.nan
        if n in (0.5, -0.5):
            root = f"{own}(math.sqrt({x}))"
            return root if n > 0 else f"{own}({own}(1) / {root})"
        if not 1 <= abs(n) <= _LONGEST_POWER or n != int(n):
            return f"{own}({x} ** {y})" if "float" in own else f"{own}(ar.pow_int({x}, {y}))"
        # By squaring: x**5 is x (x x)(x x), with no call.
        power = _product(x, int(abs(n)), own)
        return f"{own}({power})" if n > 0 else f"{own}({own}(1) / {power})"


def _product(x: str, n: int, own: str) -> str:
    if n == 1:
        return x
    half = _product(x, n // 2, own)
    square = f"{own}({half} * {half})"
    return square if n % 2 == 0 else f"{own}({square} * {x})"


def _operation(op: str, own: str, operands: list[str]) -> str:
    x, y = operands[0], operands[-1]
    if op in _DIVISIONS and "float" not in own:
        return f"{own}(ar.{op}_int({x}, {y}))"
    if op == "fmod":
        return f"m.fmod({x}, {y})"
    if op in ("floordiv", "mod"):
        return f"ar.{op}_{own}({x}, {y})"
    if op in ("add", "mul") and own == "bool":
        return f"({x} {'|' if op == 'add' else '&'} {y})"
    if op in ARITHMETIC:
        return f"{own}({x} {ARITHMETIC[op]} {y})"
    if op in EXTREMES:
        return f"ar.{op}({x}, {y})"
    if op in ("lshift", "rshift"):
        bits = 8 * SIZES[own]
        # Shifted to the right by one less, a negative number is -1 already.
        return f"{own}(ar.{op}({x}, {y}, {bits - (op == 'rshift' and own != 'uint8')}))"
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
    if op in ROUNDING:
        return f"m.{op}({x})" if "float" in own else x
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
    if wanted == "bool":
        return f"({name} != 0)"
    if "float" in held and "float" not in wanted:
        return f"{wanted}(ar.to_int64({name}))"
    return f"{wanted}({name})"


def _both(a: str, b: str) -> str:
    return b if a == "True" else f"({a} & {b})"


def _either(a: str, b: str) -> str:
    return "True" if "True" in (a, b) else f"({a} | {b})"


def _literal(value: float, dtype: str) -> str:
    if dtype == "bool":
        return repr(bool(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f"{dtype}({'nan' if math.isnan(value) else 'inf' if value > 0 else '-inf'})"
    return f"{dtype}({value!r})"
