"""The ops of an expression as typed lines of Python, for Numba."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from taskgrad.kernels.codegen.numba_typing import argument_dtype
from taskgrad.kernels.ir.dtypes import SIZES, ValueType, default_float, promote
from taskgrad.kernels.ir.expression import (
    ARITHMETIC,
    BINARY,
    BITWISE,
    COMPARISONS,
    EXTREMES,
    ROUNDING,
    UNARY,
    Expression,
    Op,
)

# Functions for which scalar_math has a vectorisable form; Numba's are one call an element.
VECTORISED = {
    *(f"{name}_{dtype}" for name in ("exp", "expm1", "log", "log1p", "tanh")
      for dtype in ("float32", "float64")),
    "erf_float32",
}  # fmt: skip
_LONGEST_POWER = 16
_DIVISIONS = ("floordiv", "mod", "fmod")
# Over the dtype t and the operands x and y.
_TEMPLATES = {
    **{name: f"{{t}}(math.{name}({{x}}))" for name in UNARY},
    **{name: f"{{t}}(math.{name}({{x}}, {{y}}))" for name in BINARY},
    **{name: f"{{t}}(np.{name}({{x}}))" for name in ("cbrt", "exp2")},
    **{name: f"m.{name}({{x}})" for name in ROUNDING},
    **{name: f"ar.{name}({{x}}, {{y}})" for name in EXTREMES},
    **{name: f"{{t}}({{x}} {sign} {{y}})" for name, sign in {**ARITHMETIC, **BITWISE}.items()},
    **{"floordiv": "ar.floordiv_{t}({x}, {y})", "mod": "ar.mod_{t}({x}, {y})"},
    **{"fmod": "m.fmod({x}, {y})", "truediv": "{t}({x} / {y})"},
    **{"neg": "{t}(-{x})", "abs": "{t}(abs({x}))", "invert": "{t}(~{x})"},
    **{"float": "{x}", "int": "{x}"},
    "sign": "({t}(1) if {x} > {t}(0) else ({t}(-1) if {x} < {t}(0) else {t}(0)))",
}
_BOOL_TEMPLATES = {
    **{"add": "({x} | {y})", "mul": "({x} & {y})", "invert": "(not {x})"},
    **{name: f"({{x}} {BITWISE[name]} {{y}})" for name in ("and", "or", "xor")},
}


class ScalarCode:
    """Generates the lines that compute one element.

    The expression is inlined: its calls are of functions without an expression. `types` are those
    of its ops, and `calls` lists what the lines call as ``call0``, ``call1``, ...
    """

    def __init__(self, expression: Expression, types: Sequence[ValueType]) -> None:
        self._ops, self._outputs, self.types = expression.ops, expression.outputs, types
        self.calls: list[Any] = []

    def lines(self) -> list[str]:
        """A line ``v... = ...`` for each op but arguments (``a0``, ...) and constants."""
        return [
            f"v{i} = {self._op(i, op)}"
            for i, op in enumerate(self._ops)
            if op.name not in ("arg", "const")
        ]

    def zero_division(self) -> tuple[list[str], str]:
        """Lines, and a condition after them: True if an integer is divided by 0; empty if never.

        A division counts only if the result depends on it through the branches that are taken.
        """
        risky = {i for i, op in enumerate(self._ops) if self._divides_integers(i, op)}
        dependent: set[int] = set()
        for i, op in enumerate(self._ops):
            if i in risky or dependent.intersection(op.operands):
                dependent.add(i)
        lines: list[str] = []
        found: list[str] = []
        used = dict.fromkeys(self._outputs, "True")  # the condition under which an op is used
        for i in sorted(dependent, reverse=True):
            condition = used.get(i)
            if condition is None:
                continue
            if condition != "True":
                lines.append(f"used{i} = {condition}")
                condition = f"used{i}"
            op = self._ops[i]
            conditions = [condition] * len(op.operands)
            if i in risky:
                found.append(_both(condition, f"({self._as(op.operands[1], 'int64')} == 0)"))
            if op.name == "select":
                chosen = self._as(op.operands[0], "bool")
                conditions[1:] = _both(condition, chosen), _both(condition, f"(not {chosen})")
            for operand, condition in zip(op.operands, conditions, strict=True):
                known = used.get(operand)
                used[operand] = condition if known is None else _either(known, condition)
        return lines, " | ".join(found)

    def _divides_integers(self, i: int, op: Op) -> bool:
        if op.name not in _DIVISIONS or self.types[i].is_float:
            return False
        divisor = self._ops[op.operands[1]]
        return divisor.name != "const" or divisor.value == 0

    def result(self, k: int, dtype: str) -> str:
        """Output k, converted to the dtype of the tensor that stores it."""
        return self._as(self._outputs[k], ValueType(dtype).computed)

    def _as(self, index: int, dtype: str) -> str:
        op, vtype = self._ops[index], self.types[index]
        if op.name == "const":
            return _literal(op.value, dtype)
        return cast(f"a{op.value}" if op.name == "arg" else f"v{index}", vtype.computed, dtype)

    def _op(self, i: int, op: Op) -> str:
        name, dtype = op.name, self.types[i].computed
        if name in COMPARISONS:
            common = promote(*(self.types[j] for j in op.operands)).computed
            a, b = (self._as(j, common) for j in op.operands)
            return f"{a} {COMPARISONS[name]} {b}"
        if name == "select":
            condition = self._as(op.operands[0], "bool")
            a, b = (self._as(j, dtype) for j in op.operands[1:])
            return f"({a} if {condition} else {b})"
        if name == "call":
            return self._call(op)
        if name in ("isnan", "isinf", "isfinite"):
            (index,) = op.operands
            vtype = self.types[index]
            x = self._as(index, vtype.computed if vtype.is_float else default_float())
            tests = {"isnan": f"{x} != {x}", "isinf": f"abs({x}) == inf"}
            return tests.get(name, f"abs({x}) < inf")
        if name == "zero":
            return f"{dtype}(0)"
        operands = [self._as(j, dtype) for j in op.operands]
        if name == "pow":
            return self._power(op, dtype, *operands)
        return _simple(name, dtype, operands)

    def _call(self, op: Op) -> str:
        function, which = op.value
        if function not in self.calls:
            self.calls.append(function)
        arguments = ", ".join(self._as(j, argument_dtype(self.types[j])) for j in op.operands)
        part = "" if which is None else f"[{which}]"
        return f"call{self.calls.index(function)}({arguments}){part}"

    def _power(self, op: Op, dtype: str, x: str, y: str) -> str:
        exponent = self._ops[op.operands[1]]
        n = exponent.value if exponent.name == "const" else math.nan
        if n in (0.5, -0.5):
            root = f"{dtype}(math.sqrt({x}))"
            return root if n > 0 else f"{dtype}({dtype}(1) / {root})"
        if not 1 <= abs(n) <= _LONGEST_POWER or n != int(n):
            return f"{dtype}({x} ** {y})" if "float" in dtype else f"{dtype}(ar.pow_int({x}, {y}))"
        # By squaring, without a call: x**5 is x (x x)(x x).
        power = _product(x, int(abs(n)), dtype)
        return f"{dtype}({power})" if n > 0 else f"{dtype}({dtype}(1) / {power})"


def _product(x: str, n: int, dtype: str) -> str:
    if n == 1:
        return x
    half = _product(x, n // 2, dtype)
    square = f"{dtype}({half} * {half})"
    return square if n % 2 == 0 else f"{dtype}({square} * {x})"


def _simple(name: str, dtype: str, operands: list[str]) -> str:
    x, y = operands[0], operands[-1]
    if name in _DIVISIONS and "float" not in dtype:
        return f"{dtype}(ar.{name}_int({x}, {y}))"
    if name in ("lshift", "rshift"):
        bits = 8 * SIZES[dtype]
        # A right shift by one bit less already results in 0 or -1.
        return f"{dtype}(ar.{name}({x}, {y}, {bits - (name == 'rshift' and dtype != 'uint8')}))"
    if name in ROUNDING and "float" not in dtype:
        return x
    if f"{name}_{dtype}" in VECTORISED:
        return f"s.{name}_{dtype}({x})"
    template = _TEMPLATES[name]
    if dtype == "bool":
        template = _BOOL_TEMPLATES.get(name, template)
    return template.format(t=dtype, x=x, y=y)


def cast(name: str, held: str, wanted: str) -> str:
    """A value converted from one computed dtype to another."""
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
