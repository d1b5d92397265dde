"""Derivatives of formulas, exact and themselves formulas: so they have derivatives, too.

A tangent is carried forward from one argument through the steps, with None for "is zero". Each
branch of a conditional is derived by itself and the condition then selects, so that an infinity in
the branch not taken never meets a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from taskgrad.errors import DerivativeError
from taskgrad.kernels.ir.expression import BITWISE, COMPARISONS, EXTREMES, Formula, Step, Writer

# Where the result is flat, or not a number of the argument's kind.
_FLAT = {*COMPARISONS, *BITWISE, "isnan", "isinf", "isfinite", "invert", "int", "zero"}
_FLAT |= {"floor", "ceil", "trunc", "rint", "floordiv", "sign"}


def pullback(formula: Formula, wanted: Sequence[int]) -> Formula:
    """From the cotangents of the outputs, then the arguments, to the cotangents of those wanted.

    Raises
    ------
    DerivativeError
        A step has no derivative; the message says which.
    """
    count = len(formula.outputs)
    writer = Writer(count + formula.arity)
    places = _copy(writer, formula, shift=count)
    results = []
    for argument in wanted:
        tangents = _tangents(writer, formula, places, {argument: writer.const(1.0)})
        total: int | None = None
        for k, output in enumerate(formula.outputs):
            total = _add(writer, total, _mul(writer, k, tangents[output]))
        results.append(writer.add("zero", count + argument) if total is None else total)
    return Formula(count + formula.arity, tuple(writer.steps), tuple(results))


def pushforward(formula: Formula, moving: Sequence[int]) -> Formula:
    """From the tangents of the moving arguments, then all arguments, to those of the outputs."""
    count = len(moving)
    writer = Writer(count + formula.arity)
    places = _copy(writer, formula, shift=count)
    seeds = {argument: k for k, argument in enumerate(moving)}
    tangents = _tangents(writer, formula, places, seeds)
    results = []
    for output in formula.outputs:
        tangent = tangents[output]
        results.append(writer.add("zero", places[output]) if tangent is None else tangent)
    return Formula(count + formula.arity, tuple(writer.steps), tuple(results))


def partials(formula: Formula) -> list[float | None]:
    """Each argument's derivative of the first output where it is the same everywhere, else None."""
    writer = Writer(formula.arity)
    places = _copy(writer, formula, shift=0)
    found: list[float | None] = []
    for argument in range(formula.arity):
        tangents = _tangents(writer, formula, places, {argument: writer.const(1.0)})
        place = tangents[formula.outputs[0]]
        step = None if place is None else writer.steps[place]
        flat = 0.0 if step is None else step.value if step.op == "const" else None
        found.append(flat)
    return found


def _copy(writer: Writer, formula: Formula, shift: int) -> list[int]:
    places: list[int] = []
    for step in formula.steps:
        if step.op == "arg":
            places.append(step.value + shift)
        else:
            operands = [places[i] for i in step.operands]
            places.append(writer.add(step.op, *operands, value=step.value))
    return places


def _tangents(
    writer: Writer, formula: Formula, places: list[int], seeds: dict[int, int]
) -> list[int | None]:
    """The tangent of every step, given those of some arguments; None where it is zero."""
    tangents: list[int | None] = []
    for step, place in zip(formula.steps, places, strict=True):
        if step.op == "arg":
            tangents.append(seeds.get(step.value))
        elif step.op in _FLAT or all(tangents[i] is None for i in step.operands):
            tangents.append(None)
        elif step.op in EXTREMES:
            tangents.append(_extreme(writer, step, places, tangents))
        elif step.op == "select":
            condition = places[step.operands[0]]
            a, b = (tangents[i] for i in step.operands[1:])
            tangents.append(_select(writer, condition, a, b))
        else:
            total: int | None = None
            operands = [places[i] for i in step.operands]
            for k, i in enumerate(step.operands):
                if tangents[i] is not None:
                    slope = _slope(writer, step, operands, place, k)
                    total = _add(writer, total, _mul(writer, tangents[i], slope))
            tangents.append(total)
    return tangents


def _extreme(
    writer: Writer, step: Step, places: list[int], tangents: list[int | None]
) -> int | None:
    """That of the operand taken; half of each where they are equal, both where one is NaN."""
    loses = "lt" if step.op == "maximum" else "gt"
    x, y = (places[i] for i in step.operands)
    total: int | None = None
    for k, (own, other) in enumerate(((x, y), (y, x))):
        tangent = tangents[step.operands[k]]
        if tangent is not None:
            half = writer.add("mul", tangent, writer.const(0.5))
            share = writer.add("select", writer.add("eq", x, y), half, tangent)
            lost = writer.add(loses, own, other)
            total = _add(writer, total, writer.add("select", lost, writer.const(0.0), share))
    return total


def _slope(writer: Writer, step: Step, operands: list[int], place: int, k: int) -> int | None:
    """The derivative of one step by its operand k."""
    if step.op == "call":
        return _slope_of_call(writer, step, operands, k)
    rules = _RULES.get(step.op)
    if rules is None:
        raise DerivativeError(f"{step.op} has no derivative here: give derivative=")
    return rules[k](writer, operands, place)


def _slope_of_call(writer: Writer, step: Step, operands: list[int], k: int) -> int:
    function = step.value[0]
    if function.derivative is None:
        raise DerivativeError(
            f"the derivative of {function.name} cannot be derived: {function.obstacle}. "
            "Give tg.vectorize the derivative= (a function of the same arguments)"
        )
    return writer.insert(function.derivative, operands)[k]


def _is(writer: Writer, place: int | None, number: float) -> bool:
    step = None if place is None else writer.steps[place]
    return step is not None and step.op == "const" and step.value == number


def _add(writer: Writer, a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return writer.add("add", a, b)


def _mul(writer: Writer, a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return None
    if _is(writer, a, 1.0):
        return b
    if _is(writer, b, 1.0):
        return a
    if _is(writer, b, -1.0):
        return writer.add("neg", a)
    return writer.add("mul", a, b)


def _select(writer: Writer, condition: int, a: int | None, b: int | None) -> int | None:
    if a == b:
        return a
    zero = writer.const(0.0)
    return writer.add("select", condition, zero if a is None else a, zero if b is None else b)


Rule = Callable[[Writer, list[int], int], "int | None"]


def _rule(text: str) -> Rule:
    """A rule from arithmetic text over the operands x and y and the result z."""
    code = compile(text, "<rule>", "eval")

    def slope(writer: Writer, operands: list[int], place: int) -> int | None:
        names = dict(zip("xy", operands, strict=False)) | {"z": place}
        shown = {name: _Written(writer, i) for name, i in names.items()}
        result = eval(code, {"f": _Functions(writer)}, shown)
        return result.place if isinstance(result, _Written) else writer.const(float(result))

    return slope


class _Written:
    """A step that arithmetic can be done on."""

    def __init__(self, writer: Writer, place: int) -> None:
        self.writer, self.place = writer, place

    def _with(self, op: str, *others: object, swapped: bool = False) -> _Written:
        operands = [o.place if isinstance(o, _Written) else self.writer.const(o) for o in others]  # type: ignore[arg-type]
        row = [*operands, self.place] if swapped else [self.place, *operands]
        return _Written(self.writer, self.writer.add(op, *row))

    def __add__(self, other: object) -> _Written:
        return self._with("add", other)

    def __radd__(self, other: object) -> _Written:
        return self._with("add", other, swapped=True)

    def __sub__(self, other: object) -> _Written:
        return self._with("sub", other)

    def __rsub__(self, other: object) -> _Written:
        return self._with("sub", other, swapped=True)

    def __mul__(self, other: object) -> _Written:
        return self._with("mul", other)

    def __rmul__(self, other: object) -> _Written:
        return self._with("mul", other, swapped=True)

    def __truediv__(self, other: object) -> _Written:
        return self._with("truediv", other)

    def __rtruediv__(self, other: object) -> _Written:
        return self._with("truediv", other, swapped=True)

    def __neg__(self) -> _Written:
        return self._with("neg")


class _Functions:
    """``f.exp(x)`` writes that operation."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __getattr__(self, op: str) -> Callable[..., _Written]:
        def apply(first: _Written, *others: object) -> _Written:
            return first._with(op, *others)

        return apply


def _power_slope(writer: Writer, operands: list[int], place: int) -> int | None:
    """y x**(y - 1), with the exponent's own number where it is one."""
    x, y = operands
    exponent = writer.steps[y]
    if exponent.op != "const":
        return _rule("f.select(f.eq(y, 0), 0.0, y * f.pow(x, y - 1))")(writer, operands, place)
    n = exponent.value
    if n == 0:
        return writer.const(0.0)
    if n == 1:
        return writer.const(1.0)
    lower = x if n == 2 else writer.add("pow", x, writer.const(n - 1))
    return writer.add("mul", writer.const(float(n)), lower)


_RULES: dict[str, tuple[Rule, ...]] = {
    op: tuple(_rule(text) for text in texts)
    for op, texts in {
        "add": ("1", "1"),
        "sub": ("1", "-1"),
        "mul": ("y", "x"),
        "truediv": ("1 / y", "-(z / y)"),
        "mod": ("1", "-f.floordiv(x, y)"),
        "neg": ("-1",),
        "float": ("1",),
        "abs": ("f.sign(x)",),
        "copysign": ("f.select(f.eq(x, 0.0), 0.0, z / x)", "0"),
        "exp": ("z",),
        "exp2": (f"z * {math.log(2)!r}",),
        "expm1": ("f.exp(x)",),
        "log": ("1 / x",),
        "log2": (f"{1 / math.log(2)!r} / x",),
        "log10": (f"{1 / math.log(10)!r} / x",),
        "log1p": ("1 / (1 + x)",),
        "sqrt": ("0.5 / z",),
        "cbrt": ("1 / (3 * (z * z))",),
        "sin": ("f.cos(x)",),
        "cos": ("-f.sin(x)",),
        "tan": ("1 + z * z",),
        "asin": ("1 / f.sqrt(1 - x * x)",),
        "acos": ("-1 / f.sqrt(1 - x * x)",),
        "atan": ("1 / (1 + x * x)",),
        "sinh": ("f.cosh(x)",),
        "cosh": ("f.sinh(x)",),
        "tanh": ("1 - z * z",),
        "asinh": ("1 / f.sqrt(x * x + 1)",),
        "acosh": ("1 / f.sqrt(x * x - 1)",),
        "atanh": ("1 / (1 - x * x)",),
        "erf": (f"{2 / math.sqrt(math.pi)!r} * f.exp(-(x * x))",),
        "erfc": (f"{-2 / math.sqrt(math.pi)!r} * f.exp(-(x * x))",),
        "atan2": tuple(
            f"f.select(f.eq(x * x + y * y, 0), 0.0, {part} / (x * x + y * y))"
            for part in ("y", "-x")
        ),
        "hypot": ("x / z", "y / z"),
        "fmod": ("1", "-f.trunc(x / y)"),
    }.items()
}
# At a base of 0 the logarithm is infinite and the power's own zero wins, as in torch.
_BY_EXPONENT = "f.select(f.eq(x, 0), f.select(f.ge(y, 0), 0.0, z * f.log(x)), z * f.log(x))"
_RULES["pow"] = (_power_slope, _rule(_BY_EXPONENT))
