"""Code objects of Python functions: nested ones, the names that they use, fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of functions, lambdas and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_codes(constant)


def names_in(code: CodeType) -> set[str]:
    """The globals and attributes that a code object refers to."""
    return {name for inner in nested_codes(code) for name in inner.co_names}


def fingerprint(value: Any) -> str:
    """A text that differs if a function, or a value that it refers to, does."""
    if isinstance(value, FunctionType):
        closed = [fingerprint(cell.cell_contents) for cell in value.__closure__ or ()]
        used = [
            f"{name}={fingerprint(value.__globals__[name])}"
            for name in sorted(names_in(value.__code__))
            if name in value.__globals__ and value.__globals__[name] is not value
        ]
        return " ".join([_text(value.__code__), *closed, *used, repr(value.__defaults__)])
    if isinstance(value, ModuleType):
        return value.__name__
    inner = getattr(value, "py_func", None)  # of a function decorated by Numba
    return fingerprint(inner) if inner is not None else f"{type(value).__name__} {value!r}"


def _text(code: CodeType) -> str:
    constants = [_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return " ".join([code.co_code.hex(), *constants, *code.co_names, *code.co_varnames])
