"""Find code that a scalar function must not contain, as its compiled form would do something else.

A kernel computes an element from other elements and constants. Code that reads or changes anything
else (a clock, random numbers, a counter, a list outside) would run once, when the function is
compiled, instead of once for each element. Error handlers would never run, as torch's arithmetic
does not raise. Both are found in the bytecode, before the function is called.
"""

from __future__ import annotations

import builtins
import dis
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

_BUILTINS = {
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset"),
    *("int", "isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "range"),
    *("reversed", "round", "set", "slice", "sorted", "sum", "tuple", "type", "zip", "complex"),
}
# Modules of the standard library without state.
_MODULES = {
    *("math", "cmath", "operator", "functools", "itertools", "numbers", "collections", "types"),
    *("typing", "enum", "dataclasses", "builtins", "_operator", "_functools", "fractions"),
    *("decimal", "statistics", "abc", "argparse", "__future__", "__main__"),
}
_CHANGES = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "add"),
    *("discard", "setdefault", "popitem", "popleft", "appendleft", "rotate", "write", "fill"),
}
_LOADS = {"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLASSDEREF"}


def objection(fn: Any) -> str:
    """Why the function cannot be compiled to what it means in Python; empty if it can."""
    return next(_objections(fn, set()), "")


def _objections(fn: Any, seen: set[int]) -> Iterator[str]:
    fn = _function(fn)
    if fn is None or id(fn) in seen or (fn.__module__ or "").startswith(("torch", "numpy")):
        return
    seen.add(id(fn))
    outside = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False))
    values: dict[str, Any] = {}
    for name, cell in outside.items():
        try:
            values[name] = cell.cell_contents
        except ValueError:  # a function that refers to one defined later
            continue
    for code in _codes(fn.__code__):
        yield from _in_code(code, set(outside), fn.__globals__, values)
        for name in code.co_names:
            if name in fn.__globals__:
                values[name] = fn.__globals__[name]
    for name, value in values.items():
        yield from _about(name, value)
        yield from _objections(value, seen)
        if isinstance(value, types.ModuleType) or _is_instance(value):
            for attribute in fn.__code__.co_names:
                found = getattr(type(value) if _is_instance(value) else value, attribute, None)
                if isinstance(found, types.FunctionType):
                    yield from _objections(found, seen)


def _function(value: Any) -> types.FunctionType | None:
    """The Python function that a call of this runs, where there is one."""
    while True:
        if isinstance(value, types.FunctionType):
            return value
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType):
            value = value.__func__
        elif isinstance(getattr(value, "py_func", None), types.FunctionType):
            value = value.py_func  # Numba's own decorator made it
        elif _is_instance(value) and not hasattr(value, "__torch_function__"):
            value = vars(type(value)).get("__call__")
        else:
            return None


def _is_instance(value: Any) -> bool:
    """Whether it is an object of a class that a user wrote."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0]
        not in {*sys.stdlib_module_names, "torch", "numpy", "numba"}
        or kind.__module__ == "__main__"
    ) and not kind.__module__.startswith("taskgrad")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _about(name: str, value: Any) -> Iterator[str]:
    """Why a value from outside the function cannot be used."""
    if isinstance(value, types.ModuleType):
        first = value.__name__.partition(".")[0]
        if first in sys.stdlib_module_names and first not in _MODULES:
            yield f"it uses the module {value.__name__}, which is no part of arithmetic"
    elif hasattr(value, "__next__") and not isinstance(value, type):
        yield f"it uses {name}, a {type(value).__name__}, which every use advances"
    else:
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType | type):
            value = owner
        callables = type | types.BuiltinFunctionType | types.FunctionType
        home = (value if isinstance(value, callables) else type(value)).__module__ or "builtins"
        first = home.partition(".")[0]
        if (first in sys.stdlib_module_names and first not in _MODULES) or ".random" in home:
            yield f"it uses {name} of {home}, which is no part of arithmetic"


def _in_code(
    code: types.CodeType, outside: set[str], names: dict[str, Any], values: dict[str, Any]
) -> Iterator[str]:
    if code.co_flags & (0x20 | 0x80 | 0x200) and code.co_name != "<genexpr>":
        yield f"line {code.co_firstlineno}: a generator or coroutine gives no number"
    raised = [
        (step.positions.lineno, step.positions.end_lineno)
        for step in dis.get_instructions(code)
        if step.opname == "RAISE_VARARGS" and step.positions is not None
    ]
    before = None
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        if step.positions is not None and step.positions.lineno is not None:
            line = step.positions.lineno
        if step.opname in ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC") and not any(
            first <= line <= last for first, last in raised if first and last
        ):
            yield f"line {line}: it writes a number as text"
        for reason in _in_step(step, before, outside, names, values):
            yield f"line {line}: {reason}"
        if step.opname not in ("PUSH_NULL", "COPY", "SWAP", "CACHE"):
            before = step


def _in_step(
    step: Any, before: Any, outside: set[str], names: dict[str, Any], values: dict[str, Any]
) -> Iterator[str]:
    op, argument = step.opname, step.argval
    if op in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        yield f"it sets the global {argument}, once and not for each element"
    elif op in ("STORE_DEREF", "DELETE_DEREF") and argument in outside:
        yield f"it sets {argument} of the function around it, once and not for each element"
    elif op in ("STORE_ATTR", "DELETE_ATTR"):
        yield f"it sets the attribute {argument}, once and not for each element"
    elif op in ("PUSH_EXC_INFO", "SETUP_FINALLY"):
        yield "it handles errors (try, with), of which torch's arithmetic raises none"
    elif op in ("IMPORT_NAME", "LOAD_BUILD_CLASS"):
        yield "it imports or defines a class"
    elif op == "MATCH_CLASS":
        yield "it matches a class, and what kind of number an argument is, is known later"
    elif op == "IS_OP" and before is not None:
        is_number = before.opname == "LOAD_CONST" and before.argval is not None
        if is_number or before.opname.startswith("LOAD_FAST"):
            yield "it compares numbers with `is`: use =="
    elif op == "LOAD_CONST" and type(argument) is int and not -(2**63) <= argument < 2**63:
        yield f"{argument} does not fit into 64 bits: write it as a float"
    elif op in _LOADS and argument not in names and argument not in outside:
        if hasattr(builtins, argument) and not _allowed(argument):
            yield f"{argument} is no function of numbers"
    elif op in ("LOAD_METHOD", "LOAD_ATTR") and before is not None and before.opname in _LOADS:
        owner = values.get(before.argval, names.get(before.argval))
        if owner is np and argument == "random":
            yield "numpy.random is no part of arithmetic"
        if argument in _CHANGES and not isinstance(owner, types.ModuleType):
            yield f"{before.argval}.{argument} changes something outside"


def _allowed(name: str) -> bool:
    found = getattr(builtins, name)
    is_error = isinstance(found, type) and issubclass(found, BaseException)
    return name in _BUILTINS or is_error or name in ("True", "False", "None", "__debug__")


def frozen(value: Any) -> Any:
    """A container from outside as one that cannot be changed; everything else as it is."""
    if type(value) is list:
        return _List(map(frozen, value))
    if type(value) is dict:
        return types.MappingProxyType({k: frozen(v) for k, v in value.items()})
    if type(value) is set:
        return frozenset(value)
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value


class _List(list[Any]):
    """A list that cannot be changed."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a list from outside is changed")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
