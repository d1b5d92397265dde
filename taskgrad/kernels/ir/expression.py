"""A scalar function as data: steps in a row, each an operation on earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
BITWISE = {"and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>"}
# Functions of floats that give a float, by their names in `math`.
UNARY = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "erf", "erfc", "gamma", "lgamma", "floor", "ceil", "trunc"),
    "rint",
}
BINARY = {"atan2", "hypot", "copysign", "fmod"}
# Not a number where one of two is not, as torch has it.
EXTREMES = {"maximum": ">=", "minimum": "<="}
ROUNDING = {"floor", "ceil", "trunc", "rint"}


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes
    ----------
    op : str
        ``arg`` (an argument), ``const`` (a number), ``call`` (of another function), ``select`` (the
        second operand where the first is true, else the third), or an operation by its name.
    operands : tuple of int
        Places of earlier steps.
    value : object
        The number of the argument; the constant; for ``call`` a `Function` and which output.
    """

    op: str
    operands: tuple[int, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Formula:
    """Steps whose first `arity` are the arguments, and the places of those that are the results."""

    arity: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Function:
    """A scalar function with all that is known of it.

    Attributes
    ----------
    name : str
    formula : Formula or None
        Of one output; None where the function could not be read as one.
    plain : callable or None
        The Python function, where there is no formula.
    obstacle : str
        Why it could not, else empty.
    derivative : Formula or None
        Given by the user: an output for each argument.
    """

    name: str
    formula: Formula | None
    plain: Callable[..., Any] | None = None
    obstacle: str = ""
    derivative: Formula | None = None


class Writer:
    """Writes steps down, each different one once."""

    def __init__(self, arity: int = 0, steps: Sequence[Step] = ()) -> None:
        self.steps = list(steps)
        self._places = {_identity(step): i for i, step in enumerate(self.steps)}
        for i in range(arity):
            self.add("arg", value=i)

    def add(self, op: str, *operands: int, value: Any = None) -> int:
        """The place of this operation, which is new if nothing like it was there."""
        step = Step(op, operands, value)
        key = _identity(step)
        if key not in self._places:
            self._places[key] = len(self.steps)
            self.steps.append(step)
        return self._places[key]

    def const(self, value: float) -> int:
        """The place of a number."""
        return self.add("const", value=value)

    def insert(self, formula: Formula, arguments: Sequence[int]) -> list[int]:
        """Write a whole formula with these steps as its arguments; the places of its outputs."""
        places: list[int] = []
        for step in formula.steps:
            if step.op == "arg":
                places.append(arguments[step.value])
            else:
                operands = [places[i] for i in step.operands]
                places.append(self.add(step.op, *operands, value=step.value))
        return [places[i] for i in formula.outputs]


def _identity(step: Step) -> tuple[Any, ...]:
    # 1, 1.0 and True are equal and not the same constant, and so are 0.0 and -0.0.
    value = step.value
    return step.op, step.operands, type(value), repr(value) if step.op == "const" else value


def called(function: Function, arity: int) -> Formula:
    """A function's formula; one call of it where that or a given derivative has to be kept."""
    if function.formula is not None and function.derivative is None:
        return function.formula
    steps = [Step("arg", (), i) for i in range(arity)]
    call = Step("call", tuple(range(arity)), (function, None))
    return Formula(arity, (*steps, call), (arity,))


def pruned(formula: Formula) -> Formula:
    """The same formula without the steps that no output needs."""
    return _rewritten(formula, expand=False)


def expanded(formula: Formula) -> Formula:
    """The same, and with the steps of the functions that it calls in the place of the calls."""
    return _rewritten(formula, expand=True)


def _rewritten(formula: Formula, expand: bool) -> Formula:
    writer = Writer(formula.arity)
    places: dict[int, int] = {}
    for i in _needed(formula):
        step = formula.steps[i]
        operands = [places[j] for j in step.operands]
        inner = step.value[0].formula if expand and step.op == "call" else None
        if inner is not None:
            places[i] = writer.insert(expanded(inner), operands)[0]
        else:
            places[i] = writer.add(step.op, *operands, value=step.value)
    return Formula(formula.arity, tuple(writer.steps), tuple(places[i] for i in formula.outputs))


def _needed(formula: Formula) -> list[int]:
    wanted = set(formula.outputs)
    for i in range(len(formula.steps) - 1, -1, -1):
        if i in wanted:
            wanted.update(formula.steps[i].operands)
    return sorted(wanted)


def text_of(formula: Formula, names: Sequence[str] | None = None) -> str:
    """The formula for a reader: one line a step.

    Examples
    --------
    >>> writer = Writer(1)
    >>> place = writer.add("mul", 0, writer.const(2.0))
    >>> print(text_of(Formula(1, tuple(writer.steps), (place,))))
    v2 = mul(a0, 2.0)
    return v2
    """

    def name(i: int) -> str:
        step = formula.steps[i]
        if step.op == "arg":
            return names[step.value] if names else f"a{step.value}"
        return repr(step.value) if step.op == "const" else f"v{i}"

    lines = []
    for i in _needed(formula):
        step = formula.steps[i]
        if step.op not in ("arg", "const"):
            called = step.value[0].name if step.op == "call" else step.op
            lines.append(f"v{i} = {called}({', '.join(map(name, step.operands))})")
    lines.append(f"return {', '.join(map(name, formula.outputs))}")
    return "\n".join(lines)
