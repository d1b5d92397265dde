"""Reads a Python function as a formula, by calling it with symbols.

The function runs once for each way through its conditionals; at the end the ways are joined by
selecting. So local variables, closures, loops of a fixed length, `min`, `abs` and calls of other
functions need no rule of their own. What cannot be read so is an obstacle: a loop whose end depends
on an argument, above all.
"""

from __future__ import annotations

import builtins
import linecache
import math
import types
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.kernels.ir.expression import Formula, Function, Writer, pruned, text_of
from taskgrad.kernels.ir.purity import frozen, objection
from taskgrad.kernels.ir.symbols import ObstacleError, RefusedError, Symbol, apply, knows

# More ways than this, or more decisions on one of them, and the function is not read.
_WAYS = 512
_DECISIONS = 40
_STEPS = 5_000
_HERE = __name__.removesuffix(".ir.tracing")


def read(fn: Callable[..., Any], arity: int, name: str) -> Function:
    """A function with its formula, or with the obstacle that stood in the way of one."""
    return Function(name, *_formula_of(fn, arity, None))


def _formula_of(
    fn: Callable[..., Any], arity: int, outputs: int | None
) -> tuple[Formula | None, Callable[..., Any] | None, str]:
    """The formula; without one the function for Numba, if it may have it, and the obstacle."""
    refused = objection(fn)
    if refused:
        return None, None, refused
    try:
        formula, again = (_explore(fn, arity, outputs) for _ in range(2))
    except _CountError:
        raise
    except RefusedError as error:
        return None, None, _describe(error)
    except Exception as error:  # whatever a user's function raises on symbols
        return None, fn, _describe(error)
    if text_of(formula) != text_of(again):
        changing = (
            "it gave two formulas when it was read twice: it depends on something that changes"
        )
        return None, None, changing
    return formula, None, ""


def read_derivative(fn: Callable[..., Any], arity: int, name: str) -> Formula:
    """A derivative that was given: a formula with an output for each argument."""
    formula, plain, obstacle = _formula_of(fn, arity, arity)
    if formula is not None:
        return formula
    if plain is None:
        raise TypeError(f"{name} cannot be compiled: {obstacle}")
    function = Function(name, None, plain, obstacle)
    steps = Writer(arity)
    which = [None] if arity == 1 else list(range(arity))
    places = [steps.add("call", *range(arity), value=(function, k)) for k in which]
    return Formula(arity, tuple(steps.steps), tuple(places))


class _CountError(ValueError):
    """A derivative gives another number of values than there are arguments."""


class _Way:
    """One way through the conditionals: the decisions prescribed first, then always true."""

    def __init__(self, prescribed: tuple[bool, ...]) -> None:
        self.prescribed = prescribed
        self.made: dict[int, bool] = {}

    def decide(self, place: int) -> bool:
        if place not in self.made:
            if len(self.made) >= _DECISIONS:
                raise ObstacleError("how often this is repeated depends on an argument")
            i = len(self.made)
            self.made[place] = self.prescribed[i] if i < len(self.prescribed) else True
        return self.made[place]


def _explore(fn: Callable[..., Any], arity: int, outputs: int | None) -> Formula:
    writer = Writer(arity)
    shadows = _Shadows()
    shadow = shadows.of(fn)
    ends: dict[tuple[bool, ...], tuple[list[int], list[int]]] = {}
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        prescribed = waiting.pop()
        if len(ends) >= _WAYS:
            raise ObstacleError(f"more than {_WAYS} ways through the conditionals")
        way = _Way(prescribed)
        arguments = [Symbol(writer, i, way.decide) for i in range(arity)]
        result = shadow(*arguments)
        shadows.check()
        made = tuple(way.made.values())
        ends[made] = (list(way.made), _places(result, arguments, outputs))
        waiting += [(*made[:i], False) for i in range(len(prescribed), len(made))]
        if len(writer.steps) > _STEPS:
            raise ObstacleError(f"more than {_STEPS} steps")
    outputs_at = tuple(_join(writer, ends, ()))
    return pruned(Formula(arity, tuple(writer.steps), outputs_at))


def _places(result: Any, arguments: list[Symbol], outputs: int | None) -> list[int]:
    place_of = arguments[0].place_of
    if outputs is None or (outputs == 1 and not isinstance(result, tuple | list)):
        return [place_of(result)]
    if not isinstance(result, tuple | list) or len(result) != outputs:
        raise _CountError(
            f"derivative= must give a tuple of {outputs} values, one for each argument; "
            f"it gave {len(result) if isinstance(result, tuple | list) else 1}"
        )
    return [place_of(part) for part in result]


def _join(
    writer: Writer,
    ends: dict[tuple[bool, ...], tuple[list[int], list[int]]],
    made: tuple[bool, ...],
) -> list[int]:
    if made in ends:
        return ends[made][1]
    conditions = next(c for decisions, (c, _) in ends.items() if decisions[: len(made)] == made)
    condition = conditions[len(made)]
    true = _join(writer, ends, (*made, True))
    false = _join(writer, ends, (*made, False))
    return [
        a if a == b else writer.add("select", condition, a, b)
        for a, b in zip(true, false, strict=True)
    ]


class _Shadows:
    """Copies of functions in which `math` and the conversions take symbols."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._tensors: list[torch.Tensor] = []

    def check(self) -> None:
        """Refuse a function that changes a tensor outside; it was given a copy."""
        if any(copy._version for copy in self._tensors):
            raise RefusedError("it changes a tensor outside, once and not for each element")

    def of(self, value: Any) -> Any:
        """What stands for a value that a function refers to: mostly the value itself."""
        if value is math:
            return _Math()
        if isinstance(value, types.BuiltinFunctionType) and value.__module__ == "math":
            return _math_function(value.__name__)
        if value in _BUILTINS if isinstance(value, type | types.BuiltinFunctionType) else False:
            return _BUILTINS[value]
        compiled = getattr(value, "py_func", None)  # of a function that Numba's own decorator made
        if isinstance(compiled, types.FunctionType):
            value = compiled
        value = frozen(value)
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            value = value.detach().clone()
            self._tensors.append(value)
        if isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith(
            ("torch", "numpy")
        ):
            return self._function(value)
        return value

    def _function(self, fn: types.FunctionType) -> Any:
        if id(fn) in self._made:
            return self._made[id(fn)]
        names: dict[str, Any] = {"__builtins__": fn.__globals__.get("__builtins__", builtins)}
        cells = tuple(types.CellType() for _ in fn.__closure__ or ())
        shadow = types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, cells)
        shadow.__kwdefaults__ = fn.__kwdefaults__
        self._made[id(fn)] = shadow
        for name in _names_in(fn.__code__):
            if name in fn.__globals__:
                names[name] = self.of(fn.__globals__[name])
            elif name in _BY_NAME:
                names[name] = _BY_NAME[name]
        for cell, original in zip(cells, fn.__closure__ or (), strict=True):
            cell.cell_contents = self.of(original.cell_contents)
        return shadow


def _names_in(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _math_function(name: str) -> Any:
    def call(*arguments: Any) -> Any:
        if any(isinstance(a, Symbol) for a in arguments):
            if not knows(name):
                raise ObstacleError(f"math.{name} cannot be written as a formula")
            return apply(name, arguments)
        return getattr(math, name)(*arguments)

    return call


class _Math:
    """Stands for the module `math`."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(math, name)
        return _math_function(name) if callable(value) else value


def _float(value: Any = 0.0) -> Any:
    return value.step("float", value) if isinstance(value, Symbol) else float(value)


def _int(value: Any = 0, *base: Any) -> Any:
    return value.step("int", value) if isinstance(value, Symbol) else int(value, *base)


def _isinstance(value: Any, kinds: Any) -> bool:
    if isinstance(value, Symbol):
        raise RefusedError("isinstance: what kind of number this is, is known later")
    return isinstance(value, kinds)


def _type(value: Any, *others: Any) -> Any:
    if isinstance(value, Symbol):
        raise RefusedError("type: what kind of number this is, is known later")
    return type(value, *others)


def _extreme(original: Any, op: str, closer: str) -> Any:
    """`min` or `max`: of symbols a step, which needs no second way through the function.

    As `torch.maximum`, it is not a number where one of them is not.
    """

    def call(*values: Any, **options: Any) -> Any:
        if len(values) == 1 and not options:
            values = tuple(values[0])
        if options or not any(isinstance(v, Symbol) for v in values):
            return original(*values, **options) if len(values) > 1 else original(values, **options)
        best = values[0]
        for value in values[1:]:
            best = of_two(best, value)
        return best

    def of_two(best: Any, value: Any) -> Any:
        if isinstance(best, Symbol) and isinstance(value, Symbol):
            return best.step(op, best, value)
        if isinstance(best, Symbol):
            if value != value:
                return best.step("select", True, value, best)
            return best.step("select", best.step(closer, value, best), value, best)
        if isinstance(value, Symbol):
            if best != best:
                return value.step("select", True, best, value)
            taken = value.step(
                "or", value.step(closer, value, best), value.step("ne", value, value)
            )
            return value.step("select", taken, value, best)
        return original(best, value)

    return call


_BUILTINS: dict[Any, Any] = {
    float: _float,
    int: _int,
    isinstance: _isinstance,
    type: _type,
    min: _extreme(min, "minimum", "lt"),
    max: _extreme(max, "maximum", "gt"),
}
_BY_NAME = {builtin.__name__: shadow for builtin, shadow in _BUILTINS.items()}


def _describe(error: Exception) -> str:
    """The obstacle, and the line of the user's code that met it."""
    found = error.__traceback__
    where = None
    while found is not None:
        frame = found.tb_frame
        if not str(frame.f_globals.get("__name__", "")).startswith(_HERE):
            where = frame.f_code.co_filename, found.tb_lineno
        found = found.tb_next
    said = str(error) if isinstance(error, ObstacleError) else f"{type(error).__name__}: {error}"
    if where is None:
        return said
    text = linecache.getline(*where).strip()
    return f"line {where[1]}{f', `{text}`' if text else ''}: {said}"
