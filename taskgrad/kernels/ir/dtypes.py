"""Type inference: the dtype of each op of an expression, by torch's promotion rules.

A dtype is its torch name (``"float32"``). Half precision is computed in float32 and rounded once,
when a result is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch

from taskgrad.kernels.ir.expression import COMPARISONS, EXTREMES, ROUNDING, Expression, Op

SIZES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "float32"), 4),
    **dict.fromkeys(("int64", "float64"), 8),
}
HALVES = ("float16", "bfloat16")
_TRUTHS = {*COMPARISONS, "isnan", "isinf", "isfinite"}
_SAME = {"neg", "abs", "sign", "add", "sub", "mul", "floordiv", "mod", "fmod", "pow"}
_SAME |= {*EXTREMES, *ROUNDING}
_WHOLE = {"and", "or", "xor", "invert", "lshift", "rshift"}
# Ops of two bools whose result is a bool, as in torch; others are refused.
_OF_BOOLS = {"add", "mul", "and", "or", "xor", "invert", "sign", *EXTREMES}


@dataclass(frozen=True)
class ValueType:
    """The dtype of a result; a weak one, of Python numbers, adopts that of the other operand."""

    dtype: str
    weak: bool = False

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def computed(self) -> str:
        """The dtype of the arithmetic."""
        return "float32" if self.dtype in HALVES else self.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``; TypeError if kernels do not take this dtype."""
    name = str(dtype).partition(".")[2]
    if name not in SIZES:
        raise TypeError(f"kernels take tensors of {', '.join(SIZES)}; got torch.{name}")
    return name


@cache
def torch_dtype(name: str) -> torch.dtype:
    """``torch.float32`` of ``"float32"``."""
    return getattr(torch, name)


def computed_dtype(name: str) -> torch.dtype:
    """The dtype in which arithmetic on this one is done."""
    return torch_dtype(ValueType(name).computed)


def default_float() -> str:
    """torch's default dtype: the result of a float function of integers."""
    return dtype_name(torch.get_default_dtype())


@cache
def _promoted(a: str, b: str) -> str:
    return dtype_name(torch.promote_types(torch_dtype(a), torch_dtype(b)))


def promote(a: ValueType, b: ValueType) -> ValueType:
    """The common type of two operands."""
    if a.weak and b.weak:
        return a if a.is_float or b.dtype == "bool" else b
    if not a.weak and not b.weak:
        return ValueType(_promoted(a.dtype, b.dtype))
    weak, strong = (a, b) if a.weak else (b, a)
    if weak.is_float and not strong.is_float:
        return ValueType(default_float())
    if weak.dtype != "bool" and strong.dtype == "bool":
        return ValueType("int64")
    return strong


def infer_types(
    expression: Expression,
    inputs: Sequence[str],
    type_of_call: Callable[[Op, list[ValueType]], ValueType],
) -> list[ValueType]:
    """The type of every op, given the dtypes of the arguments.

    TypeError if an integer operation (``&``, ``<<``) has floats as operands.
    """
    vtypes: list[ValueType] = []
    for op in expression.ops:
        operands = [vtypes[i] for i in op.operands]
        if op.name == "arg":
            vtype = ValueType(inputs[op.value])
        else:
            vtype = type_of_call(op, operands) if op.name == "call" else _type(op, operands)
        if not vtype.is_float:
            _check_numbers(op, vtype, [expression.ops[i] for i in op.operands])
        vtypes.append(vtype)
    return vtypes


def _check_numbers(op: Op, vtype: ValueType, operands: list[Op]) -> None:
    """Refuse, as torch does, constants for which an op has no integer result."""
    if op.name == "pow" and operands[1].name == "const" and operands[1].value < 0:
        raise TypeError(
            f"{vtype.dtype} to the power of {operands[1].value} is no integer, as in torch: "
            "use float(...) of the base"
        )
    if op.name in ("select", *EXTREMES) and vtype.dtype != "bool":
        info = torch.iinfo(torch_dtype(vtype.dtype))
        for operand in operands:
            if operand.name == "const" and not info.min <= operand.value <= info.max:
                raise TypeError(f"{operand.value} does not fit into {vtype.dtype}")


def _type(op: Op, operands: list[ValueType]) -> ValueType:
    if op.name == "const":
        value = op.value
        number = "bool" if isinstance(value, bool) else "int64"
        return ValueType("float64" if isinstance(value, float) else number, weak=True)
    if op.name in _TRUTHS:
        return ValueType("bool")
    if op.name == "int":
        (x,) = operands
        return ValueType("int64") if x.is_float or x.dtype == "bool" else x
    if op.name == "select":
        return promote(operands[1], operands[2])
    joined = reduce(promote, operands)
    if op.name in _WHOLE and joined.is_float:
        raise TypeError(f"{op.name} takes whole numbers, not {joined.dtype}")
    if op.name in _WHOLE or op.name in _SAME:
        if joined.dtype == "bool" and op.name not in _OF_BOOLS:
            raise TypeError(
                f"{op.name} does not take bool, as in torch: use int(...) of it, or &, | and ^"
            )
        return joined
    return joined if joined.is_float else ValueType(default_float(), joined.weak)


def result_dtype(vtype: ValueType, inputs: Sequence[ValueType]) -> str:
    """The dtype of a result; a weak float adopts that of the inputs, as in ``torch.where``."""
    if not vtype.weak or not vtype.is_float:
        return vtype.dtype
    vtype = reduce(promote, inputs, vtype)
    return default_float() if vtype.weak else vtype.dtype


def input_dtypes(tensors: Sequence[torch.Tensor], weak: Sequence[bool]) -> list[str]:
    """The arguments' dtypes for promotion: numbers and 0-d tensors adopt those of the others.

    `weak` says which arguments were Python numbers.
    """
    names = [dtype_name(t.dtype) for t in tensors]
    ranks = [0 if w else 1 if t.dim() == 0 else 2 for t, w in zip(tensors, weak, strict=True)]
    strong: dict[int, str] = {}
    for rank in sorted(set(ranks), reverse=True):
        for name, r in zip(names, ranks, strict=True):
            if r == rank:
                strong[rank] = _promoted(strong[rank], name) if rank in strong else name
    for i, rank in enumerate(ranks):
        for higher in range(2, rank, -1):
            if higher in strong and _category(strong[higher]) == _category(names[i]):
                names[i] = strong[higher]
                break
            if rank == 0 and higher in strong and "float" in names[i]:
                names[i] = default_float()
    return names


def _category(name: str) -> int:
    return 2 if "float" in name else 0 if name == "bool" else 1
