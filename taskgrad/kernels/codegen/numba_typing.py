"""What functions give that have no formula, as Numba finds it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from taskgrad.kernels.ir import dtypes
from taskgrad.kernels.ir.dtypes import Kind
from taskgrad.kernels.ir.expression import Function, Step


def require_numba() -> ModuleType:
    """Numba.

    Raises
    ------
    ModuleNotFoundError
        It is not installed; the message says how to.
    """
    try:
        import numba
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tg.vectorize compiles with Numba, which is not installed here: "
            "pip install 'taskgrad[kernels]', on every machine that has a worker",
            name="numba",
        ) from error
    found: ModuleType = numba
    return found


def kind_of_call(step: Step, operands: list[Kind]) -> Kind:
    """What Numba finds a function without a formula to give.

    Raises
    ------
    TypeError
        It cannot be compiled, or gives something that is not always a number; the message says
        what stands in the way.
    """
    numba = require_numba()
    function, which = step.value
    if function.plain is None:
        raise TypeError(f"{function.name} cannot be compiled: {function.obstacle}")
    from taskgrad.kernels.codegen.numba_pipeline import dispatcher

    types = {"bool": numba.types.boolean}
    signature = tuple(
        types.get(kind.dtype) or getattr(numba.types, argument_dtype(kind)) for kind in operands
    )
    compiler = dispatcher(function.plain)
    try:
        compiler.compile(signature)
    except numba.core.errors.NumbaError as error:
        raise TypeError(
            f"{function.name} can be neither read as a formula ({function.obstacle}) "
            f"nor compiled by Numba: {error}"
        ) from error
    found = compiler.overloads[signature].signature.return_type
    if which is not None:
        parts = found if isinstance(found, numba.types.BaseTuple) else ()
        if which >= len(parts):
            raise TypeError(f"{function.name} must give a tuple of numbers; it gives {found}")
        found = parts[which]
    return _kind_of(function, getattr(found, "literal_type", found), operands)


def argument_dtype(kind: Kind) -> str:
    """As what such a function gets an argument: every integer as Python's, of 64 bits."""
    return kind.computed if kind.is_float or kind.dtype == "bool" else "int64"


def _kind_of(function: Function, found: Any, operands: list[Kind]) -> Kind:
    name = str(found)
    if name == "bool":
        return Kind("bool")
    if name in dtypes.SIZES and "float" not in name:
        return Kind(name)
    if name not in ("float32", "float64"):
        what = "may give None" if name.startswith(("Optional", "none")) else f"gives {name}"
        raise TypeError(f"{function.name} {what}, where a number is wanted ({function.obstacle})")
    # Numba computes with Python's floats in float64; as in torch, they do not widen a float32.
    floats = [k for k in operands if k.is_float]
    joined = floats[0] if floats else Kind(dtypes.default_float())
    for kind in floats[1:]:
        joined = dtypes.promote(joined, kind, dtypes.default_float())
    return joined
