"""Trace a Python function to an expression, by calling it with symbols.

The function is called once for each path through its conditionals, and ``select`` ops join the
results. Local variables, closures, loops of a fixed length and calls of other functions thus need
no rules. What cannot be traced is unsupported, above all a loop whose end depends on an argument.
"""

from __future__ import annotations

import builtins
import linecache
import math
import types
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.kernels.ir.bytecode import names_in
from taskgrad.kernels.ir.expression import (
    Builder,
    Expression,
    ScalarFunction,
    format_expression,
    pruned,
)
from taskgrad.kernels.ir.purity import read_only, rejection
from taskgrad.kernels.ir.symbols import RejectedError, Symbol, UnsupportedError, apply

# Limits, beyond which a function has no expression: paths, decisions on a path, ops.
_PATHS = 512
_DECISIONS = 40
_OPS = 5_000
_PACKAGE = __name__.removesuffix(".ir.tracing")


def trace(
    fn: Callable[..., Any], derivative: Callable[..., Any] | None, arity: int, name: str
) -> ScalarFunction:
    """A function with its expression or, if tracing fails, with the unsupported construct.

    TypeError if the derivative can be neither traced nor compiled, ValueError if it returns another
    number of values than there are arguments.
    """
    given = None
    expression, python, unsupported = _trace(fn, arity, None)
    if derivative is not None:
        given = _trace_derivative(derivative, arity, f"the derivative of {name}")
    return ScalarFunction(name, expression, python, unsupported, given)


def _trace_derivative(fn: Callable[..., Any], arity: int, name: str) -> Expression:
    """An expression with an output for each argument."""
    expression, python, unsupported = _trace(fn, arity, arity)
    if expression is not None:
        return expression
    if python is None:
        raise TypeError(f"{name} cannot be compiled: {unsupported}")
    function = ScalarFunction(name, None, python, unsupported)
    builder = Builder(arity)
    which = [None] if arity == 1 else list(range(arity))
    return builder.build(*(builder.add("call", *range(arity), value=(function, k)) for k in which))


def _trace(
    fn: Callable[..., Any], arity: int, outputs: int | None
) -> tuple[Expression | None, Callable[..., Any] | None, str]:
    """The expression; without one the function, if Numba may compile it, and the reason."""
    reason = rejection(fn)
    if reason:
        return None, None, reason
    try:
        expression, again = (_explore(fn, arity, outputs) for _ in range(2))
    except _CountError:
        raise
    except RejectedError as error:
        return None, None, _describe(error)
    except Exception as error:  # anything that a user's function raises on symbols
        return None, fn, _describe(error)
    if format_expression(expression) != format_expression(again):
        message = (
            "it gave two formulas when it was read twice: it depends on something that changes"
        )
        return None, None, message
    return expression, None, ""


class _CountError(ValueError):
    """A derivative returns another number of values than there are arguments."""


class _Path:
    """One path through the conditionals: the prescribed decisions, then True for each new one."""

    def __init__(self, prescribed: tuple[bool, ...]) -> None:
        self.prescribed = prescribed
        self.decisions: dict[int, bool] = {}  # by the index of the condition

    def decide(self, index: int) -> bool:
        if index not in self.decisions:
            i = len(self.decisions)
            if i >= _DECISIONS:
                raise UnsupportedError("how often this is repeated depends on an argument")
            self.decisions[index] = self.prescribed[i] if i < len(self.prescribed) else True
        return self.decisions[index]


# For each path's decisions: the indices of its conditions and of its results.
_Paths = dict[tuple[bool, ...], tuple[list[int], list[int]]]


def _explore(fn: Callable[..., Any], arity: int, outputs: int | None) -> Expression:
    builder = Builder(arity)
    globals_ = _PatchedGlobals()
    patched = globals_.patch(fn)
    paths: _Paths = {}
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        prescribed = pending.pop()
        if len(paths) >= _PATHS:
            raise UnsupportedError(f"more than {_PATHS} ways through the conditionals")
        path = _Path(prescribed)
        arguments = [Symbol(builder, i, path.decide) for i in range(arity)]
        result = patched(*arguments)
        globals_.check()
        decisions = tuple(path.decisions.values())
        paths[decisions] = list(path.decisions), _indices(result, arguments, outputs)
        pending += [(*decisions[:i], False) for i in range(len(prescribed), len(decisions))]
        if len(builder.ops) > _OPS:
            raise UnsupportedError(f"more than {_OPS} steps")
    return pruned(builder.build(*_join(builder, paths, ())))


def _indices(result: Any, arguments: list[Symbol], outputs: int | None) -> list[int]:
    index_of = arguments[0].index_of
    if outputs is None or (outputs == 1 and not isinstance(result, tuple | list)):
        return [index_of(result)]
    if not isinstance(result, tuple | list) or len(result) != outputs:
        raise _CountError(
            f"derivative= must give a tuple of {outputs} values, one for each argument; "
            f"it gave {len(result) if isinstance(result, tuple | list) else 1}"
        )
    return [index_of(part) for part in result]


def _join(builder: Builder, paths: _Paths, decisions: tuple[bool, ...]) -> list[int]:
    """The results of all paths that begin with these decisions, joined by ``select``."""
    if decisions in paths:
        return paths[decisions][1]
    conditions = next(c for d, (c, _) in paths.items() if d[: len(decisions)] == decisions)
    condition = conditions[len(decisions)]
    true = _join(builder, paths, (*decisions, True))
    false = _join(builder, paths, (*decisions, False))
    return [
        a if a == b else builder.add("select", condition, a, b)
        for a, b in zip(true, false, strict=True)
    ]


class _PatchedGlobals:
    """Copies of functions whose globals accept symbols: `math`, conversions, `min` and `max`."""

    def __init__(self) -> None:
        self._functions: dict[int, Any] = {}
        self._tensors: list[torch.Tensor] = []

    def check(self) -> None:
        """Reject a function that has changed a tensor from outside; it was given a copy."""
        if any(copy._version for copy in self._tensors):
            raise RejectedError("it changes a tensor outside, once and not for each element")

    def patch(self, value: Any) -> Any:
        """The replacement for a value that a function refers to; mostly the value itself."""
        if value is math:
            return _PatchedMath()
        if isinstance(value, types.BuiltinFunctionType) and value.__module__ == "math":
            return _math_function(value.__name__)
        if isinstance(value, type | types.BuiltinFunctionType) and value in _BUILTINS:
            return _BUILTINS[value]
        python = getattr(value, "py_func", None)  # of a function decorated by Numba
        if isinstance(python, types.FunctionType):
            value = python
        value = read_only(value)
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            value = value.detach().clone()
            self._tensors.append(value)
        if isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith(
            ("torch", "numpy")
        ):
            return self._function(value)
        return value

    def _function(self, fn: types.FunctionType) -> Any:
        if id(fn) in self._functions:
            return self._functions[id(fn)]
        names: dict[str, Any] = {"__builtins__": fn.__globals__.get("__builtins__", builtins)}
        cells = tuple(types.CellType() for _ in fn.__closure__ or ())
        copy = types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, cells)
        copy.__kwdefaults__ = fn.__kwdefaults__
        self._functions[id(fn)] = copy
        for name in names_in(fn.__code__):
            if name in fn.__globals__:
                names[name] = self.patch(fn.__globals__[name])
            elif name in _BY_NAME:
                names[name] = _BY_NAME[name]
        for cell, original in zip(cells, fn.__closure__ or (), strict=True):
            cell.cell_contents = self.patch(original.cell_contents)
        return copy


def _math_function(name: str) -> Any:
    return lambda *arguments: apply(name, arguments)


class _PatchedMath:
    """The module `math`, with functions that accept symbols."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(math, name)
        return _math_function(name) if callable(value) else value


def _conversion(original: Any) -> Any:
    def call(value: Any = 0, *base: Any) -> Any:
        if isinstance(value, Symbol):
            return value.op(original.__name__, value)
        return original(value, *base)

    return call


def _type_test(original: Any) -> Any:
    def call(value: Any, *others: Any) -> Any:
        if isinstance(value, Symbol):
            message = "what kind of number this is, is known later"
            raise RejectedError(f"{original.__name__}: {message}")
        return original(value, *others)

    return call


def _extreme(original: Any, op: str, closer: str) -> Any:
    """`min` or `max` as one op, which needs no second path through the function.

    NaN is propagated, as by `torch.maximum`.
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
            return best.op(op, best, value)
        if isinstance(best, Symbol):
            if value != value:
                return best.op("select", True, value, best)
            return best.op("select", best.op(closer, value, best), value, best)
        if isinstance(value, Symbol):
            if best != best:
                return value.op("select", True, best, value)
            taken = value.op("or", value.op(closer, value, best), value.op("ne", value, value))
            return value.op("select", taken, value, best)
        return original(best, value)

    return call


_BUILTINS: dict[Any, Any] = {
    **{original: _conversion(original) for original in (float, int)},
    **{original: _type_test(original) for original in (isinstance, type)},
    min: _extreme(min, "minimum", "lt"),
    max: _extreme(max, "maximum", "gt"),
}
_BY_NAME = {builtin.__name__: patched for builtin, patched in _BUILTINS.items()}


def _describe(error: Exception) -> str:
    """The error as text, with the line of the user's code that raised it."""
    traceback = error.__traceback__
    where = None
    while traceback is not None:
        frame = traceback.tb_frame
        if not str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
            where = frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    prefix = "" if isinstance(error, UnsupportedError) else f"{type(error).__name__}: "
    if where is None:
        return f"{prefix}{error}"
    text = linecache.getline(*where).strip()
    return f"line {where[1]}{f', `{text}`' if text else ''}: {prefix}{error}"
