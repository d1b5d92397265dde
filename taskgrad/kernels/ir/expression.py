"""Scalar functions as expressions in SSA form: a list of ops, each on results of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
BITWISE = {"and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>"}
# Functions of floats that return a float, by their names in `math`.
UNARY = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "erf", "erfc", "gamma", "lgamma", "floor", "ceil", "trunc"),
    "rint",
}
BINARY = {"atan2", "hypot", "copysign", "fmod"}
# They propagate NaN, as torch's do.
EXTREMES = {"maximum": ">=", "minimum": "<="}
ROUNDING = {"floor", "ceil", "trunc", "rint"}


@dataclass(frozen=True)
class Op:
    """One operation on the results of earlier ops.

    ``arg`` is an argument, its value the position; ``const`` a number; ``call`` a call of another
    function, its value the `ScalarFunction` and which of its outputs (None: it returns one number).
    ``select`` is the second operand where the first is true, else the third.
    """

    name: str
    operands: tuple[int, ...] = ()  # indices of earlier ops
    value: Any = None


@dataclass(frozen=True)
class Expression:
    """Ops, of which the first `arity` are the arguments, and the indices of the results."""

    arity: int
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ScalarFunction:
    """A scalar function, traced."""

    name: str
    expression: Expression | None  # with one output; None if tracing failed
    python: Callable[..., Any] | None = None  # without an expression, unless it may not be compiled
    unsupported: str = ""  # why there is no expression
    derivative: Expression | None = None  # the user's: one output for each argument


class Builder:
    """Appends ops to a list; an op that is there already is reused (value numbering)."""

    def __init__(self, arity: int) -> None:
        self.ops: list[Op] = []
        self._indices: dict[tuple[Any, ...], int] = {}
        for i in range(arity):
            self.add("arg", value=i)

    def add(self, name: str, *operands: int, value: Any = None) -> int:
        """The index of this op."""
        # 1, 1.0 and True are equal but different constants; so are 0.0 and -0.0.
        key = name, operands, type(value), repr(value) if name == "const" else value
        if key not in self._indices:
            self._indices[key] = len(self.ops)
            self.ops.append(Op(name, operands, value))
        return self._indices[key]

    def const(self, value: float) -> int:
        """The index of a constant."""
        return self.add("const", value=value)

    def copy(self, expression: Expression, arguments: Sequence[int]) -> list[int]:
        """Append an expression applied to these arguments; the indices of all of its ops."""
        indices: list[int] = []
        for op in expression.ops:
            if op.name == "arg":
                indices.append(arguments[op.value])
            else:
                operands = [indices[i] for i in op.operands]
                indices.append(self.add(op.name, *operands, value=op.value))
        return indices

    def call(self, expression: Expression, arguments: Sequence[int]) -> list[int]:
        """As `copy`, but the indices of the expression's outputs."""
        indices = self.copy(expression, arguments)
        return [indices[i] for i in expression.outputs]

    def build(self, *outputs: int) -> Expression:
        """The expression of the ops so far with these outputs."""
        arity = sum(op.name == "arg" for op in self.ops)
        return Expression(arity, tuple(self.ops), outputs)


def call_of(function: ScalarFunction, arity: int) -> Expression:
    """A function's expression, or a ``call`` op if there is none or it has its own derivative."""
    if function.expression is not None and function.derivative is None:
        return function.expression
    builder = Builder(arity)
    return builder.build(builder.add("call", *range(arity), value=(function, None)))


def inlined(expression: Expression) -> Expression:
    """The same without dead code, and with calls replaced by the expressions of their functions."""
    return pruned(expression, inline=True)


def pruned(expression: Expression, inline: bool = False) -> Expression:
    """The same without dead code."""
    builder = Builder(expression.arity)
    indices: dict[int, int] = {}
    for i in _live(expression):
        op = expression.ops[i]
        operands = [indices[j] for j in op.operands]
        callee = op.value[0].expression if inline and op.name == "call" else None
        if callee is not None:
            indices[i] = builder.call(inlined(callee), operands)[0]
        else:
            indices[i] = builder.add(op.name, *operands, value=op.value)
    return builder.build(*(indices[i] for i in expression.outputs))


def _live(expression: Expression) -> list[int]:
    """The indices of the ops that the outputs depend on."""
    live = set(expression.outputs)
    for i in range(len(expression.ops) - 1, -1, -1):
        if i in live:
            live.update(expression.ops[i].operands)
    return sorted(live)


def format_expression(expression: Expression) -> str:
    """The expression as text, one line an op.

    Examples
    --------
    >>> builder = Builder(1)
    >>> print(format_expression(builder.build(builder.add("mul", 0, builder.const(2.0)))))
    v2 = mul(a0, 2.0)
    return v2
    """

    def name(i: int) -> str:
        op = expression.ops[i]
        if op.name == "arg":
            return f"a{op.value}"
        return repr(op.value) if op.name == "const" else f"v{i}"

    lines = []
    for i in _live(expression):
        op = expression.ops[i]
        if op.name not in ("arg", "const"):
            callee = op.value[0].name if op.name == "call" else op.name
            lines.append(f"v{i} = {callee}({', '.join(map(name, op.operands))})")
    lines.append(f"return {', '.join(map(name, expression.outputs))}")
    return "\n".join(lines)
