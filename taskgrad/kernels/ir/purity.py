"""Check a scalar function's bytecode for purity: no side effects, no hidden state.

Code that reads or changes state (a clock, random numbers, a counter, a list outside) would run
once, when the function is compiled, instead of once for each element. Error handlers would never
run, as torch's arithmetic does not raise.
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

from taskgrad.kernels.ir.bytecode import nested_codes

_BUILTINS = {
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset"),
    *("int", "isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "range"),
    *("reversed", "round", "set", "slice", "sorted", "sum", "tuple", "type", "zip", "complex"),
}
# Stateless modules of the standard library.
_MODULES = {
    *("math", "cmath", "operator", "functools", "itertools", "numbers", "collections", "types"),
    *("typing", "enum", "dataclasses", "builtins", "_operator", "_functools", "fractions"),
    *("decimal", "statistics", "abc", "argparse", "__future__", "__main__"),
}
_MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "add"),
    *("discard", "setdefault", "popitem", "popleft", "appendleft", "rotate", "write", "fill"),
}
_LOADS = {"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLASSDEREF"}


_ONCE = "once and not for each element"
_REJECTED = {
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), f"it sets the global {{}}, {_ONCE}"),
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), f"it sets the attribute {{}}, {_ONCE}"),
    **dict.fromkeys(
        ("PUSH_EXC_INFO", "SETUP_FINALLY"),
        "it handles errors (try, with), of which torch's arithmetic raises none",
    ),
    **dict.fromkeys(("IMPORT_NAME", "LOAD_BUILD_CLASS"), "it imports or defines a class"),
    "MATCH_CLASS": "it matches a class, and what kind of number an argument is, is known later",
}


def rejection(fn: Any) -> str:
    """Why compiling the function would change its meaning; empty if it would not."""
    return next(_rejections(fn, set()), "")


def _rejections(fn: Any, seen: set[int]) -> Iterator[str]:
    fn = _python_function(fn)
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
    for code in nested_codes(fn.__code__):
        yield from _in_code(code, set(outside), fn.__globals__, values)
        for name in code.co_names:
            if name in fn.__globals__:
                values[name] = fn.__globals__[name]
    for name, value in values.items():
        yield from _about(name, value)
        yield from _rejections(value, seen)
        if isinstance(value, types.ModuleType) or _is_instance(value):
            for attribute in fn.__code__.co_names:
                found = getattr(type(value) if _is_instance(value) else value, attribute, None)
                if isinstance(found, types.FunctionType):
                    yield from _rejections(found, seen)


def _python_function(value: Any) -> types.FunctionType | None:
    """The Python function that calling this value runs, if any."""
    while True:
        if isinstance(value, types.FunctionType):
            return value
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType):
            value = value.__func__
        elif isinstance(getattr(value, "py_func", None), types.FunctionType):
            value = value.py_func  # decorated by Numba
        elif _is_instance(value) and not hasattr(value, "__torch_function__"):
            value = vars(type(value)).get("__call__")
        else:
            return None


def _is_instance(value: Any) -> bool:
    """True for an instance of a class that a user wrote."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0]
        not in {*sys.stdlib_module_names, "torch", "numpy", "numba"}
        or kind.__module__ == "__main__"
    ) and not kind.__module__.startswith("taskgrad")


def _about(name: str, value: Any) -> Iterator[str]:
    """Why the function may not use this value from outside."""
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
        (instruction.positions.lineno, instruction.positions.end_lineno)
        for instruction in dis.get_instructions(code)
        if instruction.opname == "RAISE_VARARGS" and instruction.positions is not None
    ]
    before = None
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        if instruction.positions is not None and instruction.positions.lineno is not None:
            line = instruction.positions.lineno
        if instruction.opname in ("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC") and not any(
            first <= line <= last for first, last in raised if first and last
        ):
            yield f"line {line}: it writes a number as text"
        for reason in _in_instruction(instruction, before, outside, names, values):
            yield f"line {line}: {reason}"
        if instruction.opname not in ("PUSH_NULL", "COPY", "SWAP", "CACHE"):
            before = instruction


def _in_instruction(
    instruction: Any, before: Any, outside: set[str], names: dict[str, Any], values: dict[str, Any]
) -> Iterator[str]:
    op, argument = instruction.opname, instruction.argval
    if op in _REJECTED:
        yield _REJECTED[op].format(argument)
    elif op in ("STORE_DEREF", "DELETE_DEREF") and argument in outside:
        yield f"it sets {argument} of the function around it, {_ONCE}"
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
        if argument in _MUTATORS and not isinstance(owner, types.ModuleType):
            yield f"{before.argval}.{argument} changes something outside"


def _allowed(name: str) -> bool:
    found = getattr(builtins, name)
    is_error = isinstance(found, type) and issubclass(found, BaseException)
    return name in _BUILTINS or is_error or name in ("True", "False", "None", "__debug__")


def read_only(value: Any) -> Any:
    """A read-only copy or view of a container; any other value unchanged."""
    if type(value) is list:
        return _List(map(read_only, value))
    if type(value) is dict:
        return types.MappingProxyType({k: read_only(v) for k, v in value.items()})
    if type(value) is set:
        return frozenset(value)
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value


class _List(list[Any]):
    """A read-only list."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a list from outside is changed")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
