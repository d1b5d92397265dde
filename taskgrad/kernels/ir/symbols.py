"""Stand-ins for numbers: what is done with them is written down as steps of a formula."""

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
    Writer,
)


class ObstacleError(Exception):
    """Something that cannot be written down as a step."""


class RefusedError(ObstacleError):
    """Something that Numba would not do as Python does, either."""


class Symbol:
    """A number that is not known yet.

    Parameters
    ----------
    writer : Writer
        Where the steps go.
    place : int
        Of the step whose result this is.
    decide : callable
        Is asked when Python wants to know whether this is true.
    """

    __slots__ = ("decide", "place", "writer")
    __array_priority__ = 1000

    def __init__(self, writer: Writer, place: int, decide: Callable[[int], bool]) -> None:
        self.writer, self.place, self.decide = writer, place, decide

    def step(self, op: str, *operands: Any) -> Symbol:
        """The result of an operation on these, of which this need not be one."""
        places = [self.place_of(o) for o in operands]
        return Symbol(self.writer, self.writer.add(op, *places), self.decide)

    def place_of(self, value: Any) -> int:
        """The place of a symbol or of a number."""
        if isinstance(value, Symbol):
            return value.place
        value = _number(value)
        if not isinstance(value, bool | int | float):
            raise ObstacleError(f"a {type(value).__name__} is not a number")
        if not (isinstance(value, float) or -(2**63) <= value < 2**63):
            raise RefusedError(f"{value} does not fit into 64 bits: write it as a float")
        return self.writer.const(value)

    def __bool__(self) -> bool:
        return self.decide(self.place)

    def __pow__(self, other: Any, modulus: None = None) -> Symbol:
        return self.step("pow", self, other)

    def __rpow__(self, other: Any) -> Symbol:
        return self.step("pow", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return self.step("truediv", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.step("truediv", other, self)

    def __divmod__(self, other: Any) -> tuple[Symbol, Symbol]:
        return self.step("floordiv", self, other), self.step("mod", self, other)

    def __neg__(self) -> Symbol:
        return self.step("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return self.step("abs", self)

    def __invert__(self) -> Symbol:
        return self.step("invert", self)

    def __round__(self, digits: int | None = None) -> Symbol:
        if digits:
            raise ObstacleError("round to a number of digits")
        return self.step("rint", self)

    def __floor__(self) -> Symbol:
        return self.step("floor", self)

    def __ceil__(self) -> Symbol:
        return self.step("ceil", self)

    def __trunc__(self) -> Symbol:
        return self.step("trunc", self)

    def __float__(self) -> float:
        raise ObstacleError("a number is wanted here that is known only when the loop runs")

    __int__ = __index__ = __complex__ = __float__

    def __str__(self) -> str:
        raise ObstacleError("a number is written as text that is known only when the loop runs")

    __repr__ = __str__

    def __format__(self, how: str) -> str:
        return str(self)

    def __iter__(self) -> Any:
        raise ObstacleError("an argument is a number, and a number has no parts")

    __len__ = __getitem__ = __iter__
    __hash__ = None  # type: ignore[assignment]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options:
            raise ObstacleError(f"numpy.{ufunc.__name__}.{method}")
        return apply(ufunc.__name__, inputs, "numpy")

    @classmethod
    def __torch_function__(cls, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            raise ObstacleError(f"options of torch.{fn.__name__}")
        return apply(fn.__name__, args, "torch")


def _operator(op: str, swapped: bool) -> Callable[[Symbol, Any], Symbol]:
    if swapped:
        return lambda self, other: self.step(op, other, self)
    return lambda self, other: self.step(op, self, other)


for _op in (*ARITHMETIC, *BITWISE):
    setattr(Symbol, f"__{_op}__", _operator(_op, swapped=False))
    setattr(Symbol, f"__r{_op}__", _operator(_op, swapped=True))
for _op in COMPARISONS:
    setattr(Symbol, f"__{_op}__", _operator(_op, swapped=False))


def _number(value: Any) -> Any:
    """What a tensor or an array without dimensions holds; everything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _symbol_in(values: Any) -> Symbol:
    return next(v for v in values if isinstance(v, Symbol))


def _where(condition: Any, a: Any, b: Any) -> Any:
    return _symbol_in((condition, a, b)).step("select", condition, a, b)


def _log(x: Any, base: Any = None) -> Any:
    if base is None:
        return apply("log", (x,))
    return apply("log", (x,)) / apply("log", (base,))


def _sigmoid(x: Any) -> Any:
    x = x.step("float", x)
    grown = apply("exp", (x,))  # infinite where the other one is taken
    return _where(x >= 0, 1 / (1 + apply("exp", (-x,))), grown / (1 + grown))


# What is not one step, by its names in math, numpy and torch.
_COMPOSED: dict[str, Callable[..., Any]] = {
    "log": _log,
    "where": _where,
    "sigmoid": _sigmoid,
    "relu": lambda x: _where(x <= 0, 0, x),
    "square": lambda x: x**2,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / apply("sqrt", (x,)),
    "fabs": abs,
    "absolute": abs,
    "fma": lambda x, y, z: x * y + z,
    "degrees": lambda x: x * (180 / math.pi),
    "radians": lambda x: x * (math.pi / 180),
    "isnan": lambda x: x.step("isnan", x),
    "isinf": lambda x: x.step("isinf", x),
    "isfinite": lambda x: x.step("isfinite", x),
    "pow": operator.pow,
    "power": operator.pow,
    "abs": abs,
    "round": round,
    "negative": operator.neg,
    "add": operator.add,
    "subtract": operator.sub,
    "sub": operator.sub,
    "multiply": operator.mul,
    "mul": operator.mul,
    "divide": operator.truediv,
    "div": operator.truediv,
    "true_divide": operator.truediv,
    "remainder": operator.mod,
}
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2"}
_ALIASES |= {"arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh"}
_ALIASES |= {"round": "rint", "special_erf": "erf", "special_expit": "sigmoid"}


def knows(name: str) -> bool:
    """Whether `apply` knows a function of `math` by this name; its `remainder` is another one."""
    return name != "remainder" and (name in UNARY or name in BINARY or name in _COMPOSED)


def apply(name: str, arguments: tuple[Any, ...], package: str = "math") -> Any:
    """A function of `math`, NumPy or torch on symbols and numbers.

    Raises
    ------
    ObstacleError
        It is not an elementwise function that is known here.
    """
    op = _ALIASES.get(name, name)
    count = 1 if op in UNARY else 2 if op in BINARY or op in EXTREMES else 0
    if op == "log" and len(arguments) == 2:
        count = 0
    if not any(isinstance(a, Symbol) for a in arguments):
        return getattr(math, name)(*arguments)
    arguments = tuple(a if isinstance(a, Symbol) else _number(a) for a in arguments)
    if count and len(arguments) == count:
        return _symbol_in(arguments).step(op, *arguments)
    if not count and op in _COMPOSED:
        return _COMPOSED[op](*arguments)
    raise ObstacleError(f"{package}.{name} cannot be written as a formula")
