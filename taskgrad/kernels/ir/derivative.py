"""Derivatives of expressions: exact, and expressions themselves, so they have derivatives, too.

Tangents are propagated forward through the ops (forward mode); None is a zero tangent. Each branch
of a conditional is differentiated by itself and the condition selects one of the tangents, so an
infinite tangent in the branch not taken is never multiplied by 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from taskgrad.errors import DerivativeError
from taskgrad.kernels.ir.expression import BITWISE, COMPARISONS, EXTREMES, Builder, Expression, Op
from taskgrad.kernels.ir.symbols import Symbol

# Ops whose result is piecewise constant.
_ZERO_TANGENT = {*COMPARISONS, *BITWISE, "isnan", "isinf", "isfinite", "invert", "int", "zero"}
_ZERO_TANGENT |= {"floor", "ceil", "trunc", "rint", "floordiv", "sign"}


def pullback(expression: Expression, wanted: Sequence[int]) -> Expression:
    """From the cotangents of the outputs, then the arguments, to the cotangents of those wanted.

    DerivativeError, which names the op, if one has no derivative.
    """
    count = len(expression.outputs)
    builder, indices = _primal(expression, count)
    results = []
    for argument in wanted:
        tangents = _tangents(builder, expression, indices, {argument: builder.const(1.0)})
        total: int | None = None
        for k, output in enumerate(expression.outputs):
            total = _add(builder, total, _mul(builder, k, tangents[output]))
        results.append(builder.add("zero", count + argument) if total is None else total)
    return builder.build(*results)


def pushforward(expression: Expression, moving: Sequence[int]) -> Expression:
    """From the tangents of the moving arguments, then all arguments, to those of the outputs."""
    builder, indices = _primal(expression, len(moving))
    seeds = {argument: k for k, argument in enumerate(moving)}
    tangents = _tangents(builder, expression, indices, seeds)
    results = []
    for output in expression.outputs:
        tangent = tangents[output]
        results.append(builder.add("zero", indices[output]) if tangent is None else tangent)
    return builder.build(*results)


def constant_partials(expression: Expression) -> list[float | None]:
    """The partial derivatives of the first output that are constants; None for each other."""
    builder, indices = _primal(expression, 0)
    found: list[float | None] = []
    for argument in range(expression.arity):
        tangents = _tangents(builder, expression, indices, {argument: builder.const(1.0)})
        tangent = tangents[expression.outputs[0]]
        op = None if tangent is None else builder.ops[tangent]
        found.append(0.0 if op is None else op.value if op.name == "const" else None)
    return found


def _primal(expression: Expression, extra: int) -> tuple[Builder, list[int]]:
    """A builder with a copy of the expression, whose arguments follow `extra` other ones."""
    arity = extra + expression.arity
    builder = Builder(arity)
    return builder, builder.copy(expression, range(extra, arity))


def _tangents(
    builder: Builder, expression: Expression, indices: list[int], seeds: dict[int, int]
) -> list[int | None]:
    """The tangent of every op, given those of some arguments; None where it is zero."""
    tangents: list[int | None] = []
    for op, index in zip(expression.ops, indices, strict=True):
        if op.name == "arg":
            tangents.append(seeds.get(op.value))
        elif op.name in _ZERO_TANGENT or all(tangents[i] is None for i in op.operands):
            tangents.append(None)
        elif op.name in EXTREMES:
            tangents.append(_extreme(builder, op, indices, tangents))
        elif op.name == "select":
            condition = indices[op.operands[0]]
            a, b = (tangents[i] for i in op.operands[1:])
            tangents.append(_select(builder, condition, a, b))
        else:
            total: int | None = None
            operands = [indices[i] for i in op.operands]
            for k, i in enumerate(op.operands):
                if tangents[i] is not None:
                    partial = _partial(builder, op, operands, index, k)
                    total = _add(builder, total, _mul(builder, tangents[i], partial))
            tangents.append(total)
    return tangents


def _extreme(
    builder: Builder, op: Op, indices: list[int], tangents: list[int | None]
) -> int | None:
    """The tangent of the operand taken; half of each where they are equal, both if one is NaN."""
    loses = "lt" if op.name == "maximum" else "gt"
    x, y = (indices[i] for i in op.operands)
    total: int | None = None
    for k, (own, other) in enumerate(((x, y), (y, x))):
        tangent = tangents[op.operands[k]]
        if tangent is not None:
            half = builder.add("mul", tangent, builder.const(0.5))
            share = builder.add("select", builder.add("eq", x, y), half, tangent)
            lost = builder.add(loses, own, other)
            total = _add(builder, total, builder.add("select", lost, builder.const(0.0), share))
    return total


def _partial(builder: Builder, op: Op, operands: list[int], index: int, k: int) -> int:
    """The partial derivative of one op by its operand k."""
    if op.name != "call":
        rules = _RULES.get(op.name)
        if rules is None:
            raise DerivativeError(f"{op.name} has no derivative here: give derivative=")
        return rules[k](builder, operands, index)
    function = op.value[0]
    if function.derivative is None:
        raise DerivativeError(
            f"the derivative of {function.name} cannot be derived: {function.unsupported}. "
            "Give tg.vectorize the derivative= (a function of the same arguments)"
        )
    return builder.call(function.derivative, operands)[k]


def _add(builder: Builder, a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return builder.add("add", a, b)


def _mul(builder: Builder, a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return None
    x, y = (op.value if op.name == "const" else None for op in (builder.ops[a], builder.ops[b]))
    if x == 1.0:
        return b
    if y == 1.0:
        return a
    return builder.add("neg", a) if y == -1.0 else builder.add("mul", a, b)


def _select(builder: Builder, condition: int, a: int | None, b: int | None) -> int | None:
    if a == b:
        return a
    zero = builder.const(0.0)
    return builder.add("select", condition, zero if a is None else a, zero if b is None else b)


# Appends a partial derivative, given the indices of the operands and of the result.
Rule = Callable[[Builder, list[int], int], int]


class _Ops:
    """``f.exp(x)`` appends an op."""

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        return lambda first, *others: first.op(name, first, *others)


def _rule(text: str) -> Rule:
    """A rule from Python text over the operands x and y and the result z."""
    code = compile(text, "<rule>", "eval")

    def rule(builder: Builder, operands: list[int], index: int) -> int:
        names = dict(zip("xy", operands, strict=False)) | {"z": index}
        symbols = {name: Symbol(builder, i, bool) for name, i in names.items()}
        result = eval(code, {"f": _Ops()}, symbols)
        return result.index if isinstance(result, Symbol) else builder.const(float(result))

    return rule


_POWER_BY_BASE = _rule("f.select(f.eq(y, 0), 0.0, y * f.pow(x, y - 1))")


def _power_by_base(builder: Builder, operands: list[int], index: int) -> int:
    """y x**(y - 1), simplified if the exponent is a constant."""
    x, y = operands
    exponent = builder.ops[y]
    if exponent.name != "const":
        return _POWER_BY_BASE(builder, operands, index)
    n = exponent.value
    if n in (0, 1):
        return builder.const(float(n))
    lower = x if n == 2 else builder.add("pow", x, builder.const(n - 1))
    return builder.add("mul", builder.const(float(n)), lower)


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
# At a base of 0 the logarithm is infinite and the power's own zero counts, as in torch.
_POWER_BY_EXPONENT = "f.select(f.eq(x, 0), f.select(f.ge(y, 0), 0.0, z * f.log(x)), z * f.log(x))"
_RULES["pow"] = (_power_by_base, _rule(_POWER_BY_EXPONENT))
