"""Compile functions that have no formula, with Python's meaning and torch's arithmetic.

Numba's integer division ends the process if the quotient overflows; its `max` drops NaN; it uses 0
for a variable without a value, and reads past the end of an array. So its representation of the
function is changed before types are inferred, and variables are checked.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
from numba import types
from numba.core import ir
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.errors import TypingError
from numba.core.ir_utils import build_definitions, find_const, guard
from numba.core.untyped_passes import IRProcessing
from numba.extending import overload

from taskgrad.kernels.codegen import arithmetic as ar
from taskgrad.kernels.codegen import intrinsics as m

_dispatchers: WeakKeyDictionary[Callable[..., Any], Any] = WeakKeyDictionary()
_ZERO_DIVISION = "ZeroDivisionError: an integer is divided by 0"


def dispatcher(fn: Callable[..., Any]) -> Any:
    """The Numba dispatcher of this function."""
    if fn not in _dispatchers:  # one per function, so that Numba recognizes recursion
        make = numba.njit(error_model="numpy", boundscheck=True, pipeline_class=_Pipeline)
        _dispatchers[fn] = make(_here(fn))
    return _dispatchers[fn]


def _here(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as one of this module, which every process that loads it can import."""
    if not isinstance(fn, FunctionType):
        return fn
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__module__ = __name__
    return copy


def _is_integer(kind: Any) -> bool:
    return isinstance(kind, types.Integer | types.Boolean)


def _single(*kinds: Any) -> bool:
    return all(isinstance(kind, types.Float) and kind.bitwidth == 32 for kind in kinds)


def _numbers(*kinds: Any) -> bool:
    return all(isinstance(kind, types.Integer | types.Boolean | types.Float) for kind in kinds)


def floordiv(x: Any, y: Any) -> Any:
    """``x // y``."""


def mod(x: Any, y: Any) -> Any:
    """``x % y``."""


def divide(x: Any, y: Any) -> Any:
    """``divmod(x, y)``."""


def power(x: Any, y: Any) -> Any:
    """``x ** y``."""


def lshift(x: Any, y: Any) -> Any:
    """``x << y``."""


def rshift(x: Any, y: Any) -> Any:
    """``x >> y``."""


def larger(x: Any, y: Any) -> Any:
    """``max(x, y)``."""


def smaller(x: Any, y: Any) -> Any:
    """``min(x, y)``."""


def integer(x: Any) -> Any:
    """``int(x)``."""


def floor(x: Any) -> Any:
    """``math.floor(x)``."""


def ceil(x: Any) -> Any:
    """``math.ceil(x)``."""


def trunc(x: Any) -> Any:
    """``math.trunc(x)``."""


def rint(x: Any) -> Any:
    """``round(x)``."""


def _divides(name: str) -> Callable[..., Any]:
    of_integers = getattr(ar, f"{name}_int")
    of_floats = {n: getattr(ar, f"{name}_{n}") for n in ("float32", "float64")}

    def typed(x: Any, y: Any) -> Any:
        if not _numbers(x, y):
            return None
        if _is_integer(x) and _is_integer(y):

            def whole(x: Any, y: Any) -> Any:
                if y == 0:
                    raise RuntimeError(_ZERO_DIVISION)
                return of_integers(x, y)

            return whole
        number = np.float32 if _single(x, y) else np.float64
        inner = of_floats[number.__name__]
        return lambda x, y: inner(number(x), number(y))

    return typed


def _shifts(inner: Callable[..., Any], width: int) -> Callable[..., Any]:
    def typed(x: Any, y: Any) -> Any:
        if _is_integer(x) and _is_integer(y):
            return lambda x, y: inner(x, y, width)
        return None

    return typed


def _extreme(inner: Callable[..., Any]) -> Callable[..., Any]:
    def typed(x: Any, y: Any) -> Any:
        return (lambda x, y: inner(x, y)) if _numbers(x, y) else None

    return typed


def _rounds(name: str) -> Callable[..., Any]:
    inner = getattr(m, name)

    def typed(x: Any) -> Any:
        if isinstance(x, types.Float):
            return lambda x: inner(x)
        return (lambda x: np.int64(x)) if _is_integer(x) else None

    return typed


@overload(divide, strict=False)
def _divide(x: Any, y: Any) -> Any:
    return (lambda x, y: (floordiv(x, y), mod(x, y))) if _numbers(x, y) else None


@overload(power, strict=False)
def _power(x: Any, y: Any) -> Any:
    if not _numbers(x, y):
        return None
    if _is_integer(x) and _is_integer(y):
        return lambda x, y: ar.pow_int(x, y)
    number = np.float32 if _single(x, y) else np.float64
    return lambda x, y: number(x) ** number(y)


@overload(integer, strict=False)
def _integer(x: Any) -> Any:
    if isinstance(x, types.Float):
        return lambda x: ar.to_int64(x)
    return (lambda x: np.int64(x)) if _is_integer(x) else None


for _divided in (floordiv, mod):
    overload(_divided, strict=False)(_divides(_divided.__name__))
for _rounded in (floor, ceil, trunc, rint):
    overload(_rounded, strict=False)(_rounds(_rounded.__name__))
overload(lshift, strict=False)(_shifts(ar.lshift, 64))
overload(rshift, strict=False)(_shifts(ar.rshift, 63))
overload(larger, strict=False)(_extreme(ar.maximum))
overload(smaller, strict=False)(_extreme(ar.minimum))

_OPERATORS = {
    **{operator.floordiv: floordiv, operator.mod: mod, operator.pow: power},
    **{operator.lshift: lshift, operator.rshift: rshift},
}
# What stands in the place of a function that is called with this many arguments.
_FUNCTIONS: dict[tuple[Any, int], Any] = {
    **{(fn, 2): ours for fn, ours in _OPERATORS.items()},
    **{(np.floor_divide, 2): floordiv, (np.remainder, 2): mod, (np.power, 2): power},
    **{(np.left_shift, 2): lshift, (np.right_shift, 2): rshift},
    **{(builtins.divmod, 2): divide, (builtins.pow, 2): power, (math.pow, 2): power},
    **{(builtins.int, 1): integer, (builtins.round, 1): rint},
    **{(math.floor, 1): floor, (math.ceil, 1): ceil, (math.trunc, 1): trunc},
}
_EXTREMES: dict[Any, Any] = {max: larger, min: smaller}


@register_pass(mutates_CFG=False, analysis_only=False)
class _Arithmetic(FunctionPass):
    """Puts torch's arithmetic in the place of Numba's."""

    _name = "taskgrad_arithmetic"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        found = state.func_ir
        _refuse_unassigned(found)
        for block in found.blocks.values():
            body: list[Any] = []
            for statement in block.body:
                if isinstance(statement, ir.Assign) and isinstance(statement.value, ir.Expr):
                    statement.value = _replaced(found, block.scope, statement.value, body)
                body.append(statement)
            block.body = body
        found._definitions = build_definitions(found.blocks)
        return True


def _replaced(found: Any, scope: Any, value: Any, body: list[Any]) -> Any:
    """An expression with torch's arithmetic; what it needs before goes to the end of the body."""

    def call(function: Any, *arguments: Any) -> Any:
        name = scope.redefine("$taskgrad", value.loc)
        body.append(ir.Assign(ir.Global(name.name, function, value.loc), name, value.loc))
        return ir.Expr.call(name, arguments, (), value.loc)

    if value.op in ("binop", "inplace_binop"):
        fn = value.fn if value.op == "binop" else value.immutable_fn
        return call(_OPERATORS[fn], value.lhs, value.rhs) if fn in _OPERATORS else value
    if value.op != "call" or value.kws or value.vararg is not None:
        return value
    function = _called(found, value.func)
    count = len(value.args)
    if isinstance(function, numba.core.registry.CPUDispatcher):
        return call(dispatcher(function.py_func), *value.args)
    if function in (isinstance, type):
        raise TypingError(
            f"line {value.loc.line}: {function.__name__}(): a number of a tensor has another type "
            "than Python's",
            loc=value.loc,
        )
    try:
        known = _FUNCTIONS.get((function, count))
        extreme = _EXTREMES.get(function)
    except TypeError:  # not hashable
        return value
    if known is not None:
        return call(known, *value.args)
    if extreme is not None and count > 1:
        first, *others = value.args
        for other in others[:-1]:
            name = scope.redefine("$taskgrad", value.loc)
            body.append(ir.Assign(call(extreme, first, other), name, value.loc))
            first = name
        return call(extreme, first, others[-1])
    return value


def _called(found: Any, name: Any) -> Any:
    """The function that a variable holds, where that is known; else None."""
    definition = guard(found.get_definition, name)
    if isinstance(definition, ir.Global | ir.FreeVar):
        return definition.value
    if isinstance(definition, ir.Expr) and definition.op == "getattr":
        owner = _called(found, definition.value)
        if owner in (math, np, operator):
            return getattr(owner, definition.attr, None)
    return None


def _refuse_unassigned(found: Any) -> None:
    """Refuse a variable that a way through the function uses before it has a value."""
    blocks = found.blocks
    graph = compute_cfg_from_blocks(blocks)
    every = {s.target.name for b in blocks.values() for s in b.body if isinstance(s, ir.Assign)}
    back = {
        (latch, loop.header) for loop in graph.loops().values() for latch in _latches(graph, loop)
    }
    runs = {loop.header for loop in graph.loops().values() if _runs(found, blocks[loop.header])}
    after = {label: set(every) for label in blocks}
    before: dict[int, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for label in graph.topo_order():
            known: set[str] | None = None
            for origin, _ in graph.predecessors(label):
                values = after[origin]
                if origin in runs and not _enters(graph, origin, label):
                    # A loop that runs at least once is left after a turn, not before the first.
                    latches = [after[a] for a, header in back if header == origin]
                    turned = set.intersection(*latches) if latches else set(every)
                    values = values | turned
                known = set(values) if known is None else known & values
            before[label] = known or set()
            values = before[label] | _assigned(blocks[label])
            if values != after[label]:
                after[label], changed = values, True
    for label, block in blocks.items():
        known = set(before.get(label, ()))
        for statement in block.body:
            _refuse_uses(statement, known)
            if isinstance(statement, ir.Assign):
                known.add(statement.target.name)


def _refuse_uses(statement: Any, known: set[str]) -> None:
    for variable in _read_by(statement):
        if not variable.name.startswith("$") and variable.name not in known:
            raise TypingError(
                f"line {variable.loc.line}: {variable.name} may have no value here; "
                "give it one before",
                loc=variable.loc,
            )


def _read_by(statement: Any) -> list[Any]:
    """The variables that a statement uses."""
    if isinstance(statement, ir.Del):
        return []
    if not isinstance(statement, ir.Assign):
        return list(statement.list_vars())
    if isinstance(statement.value, ir.Var):
        return [statement.value]
    return list(statement.value.list_vars()) if isinstance(statement.value, ir.Expr) else []


def _assigned(block: Any) -> set[str]:
    return {s.target.name for s in block.body if isinstance(s, ir.Assign)}


def _latches(graph: Any, loop: Any) -> list[int]:
    return [label for label, _ in graph.predecessors(loop.header) if label in loop.body]


def _enters(graph: Any, header: int, label: int) -> bool:
    loops = graph.loops()
    return header in loops and label in loops[header].body


def _runs(found: Any, block: Any) -> bool:
    """Whether this is the head of a loop over a `range` of constants that is not empty."""
    for statement in block.body:
        value = getattr(statement, "value", None)
        if isinstance(value, ir.Expr) and value.op == "iternext":
            iterator = guard(found.get_definition, value.value)
            while isinstance(iterator, ir.Var):
                iterator = guard(found.get_definition, iterator)
            if not isinstance(iterator, ir.Expr) or iterator.op != "getiter":
                return False
            made = guard(found.get_definition, iterator.value)
            if not isinstance(made, ir.Expr) or made.op != "call":
                return False
            if _called(found, made.func) is not range:
                return False
            bounds = [guard(find_const, found, argument) for argument in made.args]
            return all(isinstance(b, int) for b in bounds) and len(range(*bounds)) > 0
    return False


class _Pipeline(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_Arithmetic, IRProcessing)
        passes.finalize()
        return [passes]
