"""Numba pipeline for functions without an expression: Python's semantics, torch's arithmetic.

Plain Numba traps if an integer quotient overflows, drops NaN in `max`, uses 0 for an unassigned
variable, and reads past the end of an array. A pass over Numba's IR, before type inference,
replaces the arithmetic and refuses variables that may be unassigned; bounds checks are on.
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
        _dispatchers[fn] = make(_in_this_module(fn))
    return _dispatchers[fn]


def _in_this_module(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A copy that belongs to this module, which any process that loads it can import."""
    if not isinstance(fn, FunctionType):
        return fn
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__module__ = __name__
    return copy


def _integers(*arguments: Any) -> bool:
    return all(isinstance(a, types.Integer | types.Boolean) for a in arguments)


def _float32s(*arguments: Any) -> bool:
    return all(isinstance(a, types.Float) and a.bitwidth == 32 for a in arguments)


def _numbers(*arguments: Any) -> bool:
    return all(isinstance(a, types.Integer | types.Boolean | types.Float) for a in arguments)


def _declare(name: str, arity: int) -> Any:
    """A function without a body, for which `overload` below registers implementations."""
    fn: Any = (lambda x: None) if arity == 1 else (lambda x, y: None)
    fn.__name__ = fn.__qualname__ = name
    return fn


floordiv, mod, divide, power, lshift, rshift, maximum, minimum = (
    _declare(name, 2)
    for name in ("floordiv", "mod", "divide", "power", "lshift", "rshift", "maximum", "minimum")
)
integer, floor, ceil, trunc, rint = (
    _declare(name, 1) for name in ("integer", "floor", "ceil", "trunc", "rint")
)


def _divides(name: str) -> Callable[..., Any]:
    of_integers = getattr(ar, f"{name}_int")
    of_floats = {n: getattr(ar, f"{name}_{n}") for n in ("float32", "float64")}

    def typed(x: Any, y: Any) -> Any:
        if not _numbers(x, y):
            return None
        if _integers(x, y):

            def whole(x: Any, y: Any) -> Any:
                if y == 0:
                    raise RuntimeError(_ZERO_DIVISION)
                return of_integers(x, y)

            return whole
        number = np.float32 if _float32s(x, y) else np.float64
        inner = of_floats[number.__name__]
        return lambda x, y: inner(number(x), number(y))

    return typed


def _when(test: Callable[..., bool], implementation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: implementation if test(x, y) else None


def _rounds(of_floats: Callable[..., Any]) -> Callable[..., Any]:
    def typed(x: Any) -> Any:
        if isinstance(x, types.Float):
            return lambda x: of_floats(x)
        return (lambda x: np.int64(x)) if _integers(x) else None

    return typed


@overload(power, strict=False)
def _power(x: Any, y: Any) -> Any:
    if not _numbers(x, y):
        return None
    if _integers(x, y):
        return lambda x, y: ar.pow_int(x, y)
    number = np.float32 if _float32s(x, y) else np.float64
    return lambda x, y: number(x) ** number(y)


for _divided in (floordiv, mod):
    overload(_divided, strict=False)(_divides(_divided.__name__))
for _rounded in (floor, ceil, trunc, rint):
    overload(_rounded, strict=False)(_rounds(getattr(m, _rounded.__name__)))
overload(integer, strict=False)(_rounds(ar.to_int64))
overload(lshift, strict=False)(_when(_integers, lambda x, y: ar.lshift(x, y, 64)))
overload(rshift, strict=False)(_when(_integers, lambda x, y: ar.rshift(x, y, 63)))
overload(maximum, strict=False)(_when(_numbers, lambda x, y: ar.maximum(x, y)))
overload(minimum, strict=False)(_when(_numbers, lambda x, y: ar.minimum(x, y)))
overload(divide, strict=False)(_when(_numbers, lambda x, y: (floordiv(x, y), mod(x, y))))

_OPERATORS = {
    **{operator.floordiv: floordiv, operator.mod: mod, operator.pow: power},
    **{operator.lshift: lshift, operator.rshift: rshift},
}
# Replacements, by the function called and the number of arguments.
_FUNCTIONS: dict[tuple[Any, int], Any] = {
    **{(fn, 2): ours for fn, ours in _OPERATORS.items()},
    **{(np.floor_divide, 2): floordiv, (np.remainder, 2): mod, (np.power, 2): power},
    **{(np.left_shift, 2): lshift, (np.right_shift, 2): rshift},
    **{(builtins.divmod, 2): divide, (builtins.pow, 2): power, (math.pow, 2): power},
    **{(builtins.int, 1): integer, (builtins.round, 1): rint},
    **{(math.floor, 1): floor, (math.ceil, 1): ceil, (math.trunc, 1): trunc},
}
_EXTREMES: dict[Any, Any] = {max: maximum, min: minimum}


@register_pass(mutates_CFG=False, analysis_only=False)
class _Arithmetic(FunctionPass):
    """Replaces Numba's arithmetic by torch's."""

    _name = "taskgrad_arithmetic"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        func_ir = state.func_ir
        _refuse_unassigned(func_ir)
        for block in func_ir.blocks.values():
            body: list[Any] = []
            for statement in block.body:
                if isinstance(statement, ir.Assign) and isinstance(statement.value, ir.Expr):
                    statement.value = _replaced(func_ir, block.scope, statement.value, body)
                body.append(statement)
            block.body = body
        func_ir._definitions = build_definitions(func_ir.blocks)
        return True


def _replaced(func_ir: Any, scope: Any, value: Any, body: list[Any]) -> Any:
    """An expression with torch's arithmetic; assignments that it needs are appended to `body`."""

    def call(function: Any, *arguments: Any) -> Any:
        name = scope.redefine("$taskgrad", value.loc)
        body.append(ir.Assign(ir.Global(name.name, function, value.loc), name, value.loc))
        return ir.Expr.call(name, arguments, (), value.loc)

    if value.op in ("binop", "inplace_binop"):
        fn = value.fn if value.op == "binop" else value.immutable_fn
        return call(_OPERATORS[fn], value.lhs, value.rhs) if fn in _OPERATORS else value
    if value.op != "call" or value.kws or value.vararg is not None:
        return value
    function = _called(func_ir, value.func)
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


def _called(func_ir: Any, name: Any) -> Any:
    """The function that a variable refers to, if known."""
    definition = guard(func_ir.get_definition, name)
    if isinstance(definition, ir.Global | ir.FreeVar):
        return definition.value
    if isinstance(definition, ir.Expr) and definition.op == "getattr":
        owner = _called(func_ir, definition.value)
        if owner in (math, np, operator):
            return getattr(owner, definition.attr, None)
    return None


def _refuse_unassigned(func_ir: Any) -> None:
    """Refuse variables that a path through the function uses unassigned (definite assignment)."""
    blocks = func_ir.blocks
    graph = compute_cfg_from_blocks(blocks)
    assigned = {label: _assigned(block) for label, block in blocks.items()}
    every: set[str] = set().union(*assigned.values())
    # Loops that run at least once are left only after an iteration, that is after a latch.
    latches = {
        loop.header: [a for a, _ in graph.predecessors(loop.header) if a in loop.body]
        for loop in graph.loops().values()
        if _runs(func_ir, blocks[loop.header])
    }
    after = {label: set(every) for label in blocks}
    before: dict[int, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for label in graph.topo_order():
            known: set[str] | None = None
            for origin, _ in graph.predecessors(label):
                values = after[origin]
                if origin in latches and label not in graph.loops()[origin].body:
                    ends = [after[latch] for latch in latches[origin]]
                    values = values | (set.intersection(*ends) if ends else every)
                known = set(values) if known is None else known & values
            before[label] = known or set()
            values = before[label] | assigned[label]
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


def _runs(func_ir: Any, block: Any) -> bool:
    """True for the header of a loop over a non-empty `range` of constants."""
    for statement in block.body:
        value = getattr(statement, "value", None)
        if isinstance(value, ir.Expr) and value.op == "iternext":
            iterator = guard(func_ir.get_definition, value.value)
            while isinstance(iterator, ir.Var):
                iterator = guard(func_ir.get_definition, iterator)
            if not isinstance(iterator, ir.Expr) or iterator.op != "getiter":
                return False
            made = guard(func_ir.get_definition, iterator.value)
            if not isinstance(made, ir.Expr) or made.op != "call":
                return False
            if _called(func_ir, made.func) is not range:
                return False
            bounds = [guard(find_const, func_ir, argument) for argument in made.args]
            return all(isinstance(b, int) for b in bounds) and len(range(*bounds)) > 0
    return False


class _Pipeline(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_Arithmetic, IRProcessing)
        passes.finalize()
        return [passes]
