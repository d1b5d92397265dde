"""What functions give that have no formula, as Numba finds it."""

from __future__ import annotations

from taskgrad.kernels import dtypes
from taskgrad.kernels.compiled import require_numba
from taskgrad.kernels.dtypes import Kind
from taskgrad.kernels.formula import Step


def kind_of_call(step: Step, operands: list[Kind]) -> Kind:
    """What Numba finds a function without a formula to give."""
    numba = require_numba()
    function, which = step.value
    signature = tuple(getattr(numba.types, _numba_name(kind)) for kind in operands)
    dispatcher = numba.njit(error_model="numpy")(function.plain)
    try:
        dispatcher.compile(signature)
    except numba.core.errors.NumbaError as error:
        raise TypeError(
            f"{function.name} can be neither read as a formula ({function.obstacle}) "
            f"nor compiled by Numba: {error}"
        ) from error
    found = dispatcher.overloads[signature].signature.return_type
    if which is not None:
        found = found[which]
    name = str(getattr(found, "literal_type", found))
    floats = [k for k in operands if k.is_float]
    if name == "bool":
        return Kind("bool")
    if not name.startswith("float"):
        return Kind(name if name in dtypes.SIZES else "int64")
    # Numba computes with Python's floats in float64; as in torch, they do not widen a float32.
    joined = floats[0] if floats else Kind(dtypes.default_float())
    for kind in floats[1:]:
        joined = dtypes.promote(joined, kind, dtypes.default_float())
    return joined


def _numba_name(kind: Kind) -> str:
    return "boolean" if kind.dtype == "bool" else kind.computed
