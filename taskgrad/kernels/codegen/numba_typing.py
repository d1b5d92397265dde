"""Return types of functions without an expression, inferred by Numba."""

from __future__ import annotations

from functools import reduce
from types import ModuleType
from typing import Any

from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.dtypes import ValueType
from taskgrad.kernels.ir.expression import Op, ScalarFunction


def require_numba() -> ModuleType:
    """Import Numba; ModuleNotFoundError, which says how to install it, if it is missing."""
    try:
        import numba
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tg.vectorize compiles with Numba, which is not installed here: "
            "pip install 'taskgrad[kernels]', on every machine that has a worker",
            name="numba",
        ) from error
    return numba


def type_of_call(op: Op, operands: list[ValueType]) -> ValueType:
    """The type that Numba infers for a call of a function without an expression.

    TypeError, which says why, if it cannot be compiled or may return something else than a number.
    """
    numba = require_numba()
    function, which = op.value
    if function.python is None:
        raise TypeError(f"{function.name} cannot be compiled: {function.unsupported}")
    from taskgrad.kernels.codegen.numba_pipeline import dispatcher

    types = {"bool": numba.types.boolean}
    signature = tuple(
        types.get(vtype.dtype) or getattr(numba.types, argument_dtype(vtype)) for vtype in operands
    )
    compiler = dispatcher(function.python)
    try:
        compiler.compile(signature)
    except numba.core.errors.NumbaError as error:
        raise TypeError(
            f"{function.name} can be neither read as a formula ({function.unsupported}) "
            f"nor compiled by Numba: {error}"
        ) from error
    found = compiler.overloads[signature].signature.return_type
    if which is not None:
        parts = found if isinstance(found, numba.types.BaseTuple) else ()
        if which >= len(parts):
            raise TypeError(f"{function.name} must give a tuple of numbers; it gives {found}")
        found = parts[which]
    return _value_type(function, getattr(found, "literal_type", found), operands)


def argument_dtype(vtype: ValueType) -> str:
    """The dtype in which such a function gets an argument: integers as int64, like Python's."""
    return vtype.computed if vtype.is_float or vtype.dtype == "bool" else "int64"


def _value_type(function: ScalarFunction, found: Any, operands: list[ValueType]) -> ValueType:
    name = str(found)
    if name == "bool":
        return ValueType("bool")
    if name in dtypes.SIZES and "float" not in name:
        return ValueType(name)
    if name not in ("float32", "float64"):
        what = "may give None" if name.startswith(("Optional", "none")) else f"gives {name}"
        raise TypeError(
            f"{function.name} {what}, where a number is wanted ({function.unsupported})"
        )
    # Numba promotes float32 to float64 with Python floats; torch does not.
    floats = [k for k in operands if k.is_float]
    return reduce(dtypes.promote, floats) if floats else ValueType(dtypes.default_float())
