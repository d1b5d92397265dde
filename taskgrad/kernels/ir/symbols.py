"""Symbolic numbers for tracing: operations on them become ops of an expression."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from taskgrad.kernels.ir.expression import (
    ARITHMETIC,
    BINARY,
    BITWISE,
    COMPARISONS,
    EXTREMES,
    UNARY,
    Builder,
    Expression,
)


class UnsupportedError(Exception):
    """Tracing met something that no op expresses."""


class RejectedError(UnsupportedError):
    """Tracing met something that Numba would compile to another meaning than Python's."""


class Symbol:
    """A number that is not known yet; operations on it append ops to an expression (a tracer).

    It is the result of the builder's op at `index`. ``decide(index)`` is called when Python asks
    for its truth value.
    """

    __slots__ = ("builder", "decide", "index")
    __array_priority__ = 1000

    def __init__(self, builder: Builder, index: int, decide: Callable[[int], bool]) -> None:
        self.builder, self.index, self.decide = builder, index, decide

    def op(self, name: str, *operands: Any) -> Symbol:
        """The result of an op on symbols or numbers; `self` is an operand only if given as one."""
        indices = [self.index_of(o) for o in operands]
        return Symbol(self.builder, self.builder.add(name, *indices), self.decide)

    def index_of(self, value: Any) -> int:
        """The index of a symbol or of a number, which becomes a constant."""
        if isinstance(value, Symbol):
            return value.index
        value = _number(value)
        if not isinstance(value, bool | int | float):
            raise UnsupportedError(f"a {type(value).__name__} is not a number")
        if not (isinstance(value, float) or -(2**63) <= value < 2**63):
            raise RejectedError(f"{value} does not fit into 64 bits: write it as a float")
        return self.builder.const(value)

    def __bool__(self) -> bool:
        return self.decide(self.index)

    def __divmod__(self, other: Any) -> tuple[Symbol, Symbol]:
        return self.op("floordiv", self, other), self.op("mod", self, other)

    def __pos__(self) -> Symbol:
        return self

    def __round__(self, digits: int | None = None) -> Symbol:
        if digits:
            raise UnsupportedError("round to a number of digits")
        return self.op("rint", self)

    def __float__(self) -> float:
        raise UnsupportedError("a number is wanted here that is known only when the loop runs")

    __int__ = __index__ = __complex__ = __float__

    def __str__(self) -> str:
        raise UnsupportedError("a number is written as text that is known only when the loop runs")

    __repr__ = __str__

    def __format__(self, how: str) -> str:
        return str(self)

    def __iter__(self) -> Any:
        raise UnsupportedError("an argument is a number, and a number has no parts")

    __len__ = __getitem__ = __iter__
    __hash__ = None  # type: ignore[assignment]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options:
            raise UnsupportedError(f"numpy.{ufunc.__name__}.{method}")
        return apply(ufunc.__name__, inputs, "numpy")

    @classmethod
    def __torch_function__(cls, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            raise UnsupportedError(f"options of torch.{fn.__name__}")
        return apply(fn.__name__, args, "torch")


def _binary(name: str, swapped: bool = False) -> Callable[[Symbol, Any], Symbol]:
    if swapped:
        return lambda self, other: self.op(name, other, self)
    return lambda self, other: self.op(name, self, other)


def _unary(name: str) -> Callable[[Symbol], Symbol]:
    return lambda self: self.op(name, self)


for _name in ("neg", "abs", "invert", "floor", "ceil", "trunc"):
    setattr(Symbol, f"__{_name}__", _unary(_name))
for _name in (*ARITHMETIC, *BITWISE, *COMPARISONS, "truediv", "pow"):
    setattr(Symbol, f"__{_name}__", _binary(_name))
for _name in (*ARITHMETIC, *BITWISE, "truediv", "pow"):
    setattr(Symbol, f"__r{_name}__", _binary(_name, swapped=True))


def _number(value: Any) -> Any:
    """The number in a 0-d tensor or array; any other value unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _symbol_in(values: Any) -> Symbol:
    return next(v for v in values if isinstance(v, Symbol))


def _where(condition: Any, a: Any, b: Any) -> Any:
    return _symbol_in((condition, a, b)).op("select", condition, a, b)


def _sigmoid(x: Any) -> Any:
    x = x.op("float", x)
    exp = apply("exp", (x,))  # may overflow only where the other branch is selected
    return _where(x >= 0, 1 / (1 + apply("exp", (-x,))), exp / (1 + exp))


# Functions that are several ops, by their names in math, numpy and torch.
_COMPOSED: dict[str, Callable[..., Any]] = {
    **{"where": _where, "sigmoid": _sigmoid},
    **dict.fromkeys(("abs", "fabs", "absolute"), abs),
    **dict.fromkeys(("pow", "power"), operator.pow),
    **dict.fromkeys(("sub", "subtract"), operator.sub),
    **dict.fromkeys(("mul", "multiply"), operator.mul),
    **dict.fromkeys(("div", "divide", "true_divide"), operator.truediv),
    **{"add": operator.add, "remainder": operator.mod, "negative": operator.neg},
    **{name: _unary(name) for name in ("isnan", "isinf", "isfinite")},
    "log": lambda x, base: apply("log", (x,)) / apply("log", (base,)),
    "relu": lambda x: _where(x <= 0, 0, x),
    "square": lambda x: x**2,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / apply("sqrt", (x,)),
    "fma": lambda x, y, z: x * y + z,
    "degrees": lambda x: x * (180 / math.pi),
    "radians": lambda x: x * (math.pi / 180),
}
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2"}
_ALIASES |= {"arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh"}
_ALIASES |= {"round": "rint", "special_erf": "erf", "special_expit": "sigmoid"}


def apply(name: str, arguments: tuple[Any, ...], package: str = "math") -> Any:
    """A function of `math`, NumPy or torch on symbols and numbers.

    UnsupportedError if the function is not elementwise or has no rule here.
    """
    if not any(isinstance(a, Symbol) for a in arguments):
        return getattr(math, name)(*arguments)
    op = _ALIASES.get(name, name)
    count = 1 if op in UNARY else 2 if op in BINARY or op in EXTREMES else 0
    if op == "log" and len(arguments) == 2:
        count = 0
    arguments = tuple(a if isinstance(a, Symbol) else _number(a) for a in arguments)
    if count and len(arguments) == count:
        return _symbol_in(arguments).op(op, *arguments)
    composed = not count and op in _COMPOSED
    if composed and (package, name) != ("math", "remainder"):  # which differs from torch's
        return _COMPOSED[op](*arguments)
    raise UnsupportedError(f"{package}.{name} cannot be written as a formula")


def inline(expression: Expression, arguments: tuple[Any, ...]) -> Symbol:
    """An expression with one output, applied to symbols and numbers."""
    symbol = _symbol_in(arguments)
    (index,) = symbol.builder.call(expression, [symbol.index_of(x) for x in arguments])
    return Symbol(symbol.builder, index, symbol.decide)
