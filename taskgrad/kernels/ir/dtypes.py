"""Which dtype each step of a formula has: torch's promotion, with Python's numbers giving way.

A dtype is written by its torch name (``"float32"``). Half precision is computed in float32, and
rounded once, when a result is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from taskgrad.kernels.ir.expression import COMPARISONS, EXTREMES, ROUNDING, Formula, Step

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
# What torch does with two bools: of "+" and "*" one comes, too, and the rest is refused.
_OF_BOOLS = {"add", "mul", "and", "or", "xor", "invert", "sign", *EXTREMES}


@dataclass(frozen=True)
class Kind:
    """The dtype of a step; a weak one is a Python number's, and takes that of what it meets."""

    dtype: str
    weak: bool = False

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def computed(self) -> str:
        """The dtype that a processor computes in."""
        return "float32" if self.dtype in HALVES else self.dtype


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``.

    Raises
    ------
    TypeError
        Kernels do not take this dtype.
    """
    name = str(dtype).partition(".")[2]
    if name not in SIZES:
        raise TypeError(f"kernels take tensors of {', '.join(SIZES)}; got torch.{name}")
    return name


@cache
def torch_dtype(name: str) -> torch.dtype:
    """``torch.float32`` of ``"float32"``."""
    found: torch.dtype = getattr(torch, name)
    return found


def default_float() -> str:
    """What integers become where a float comes out: torch's default dtype."""
    return name_of(torch.get_default_dtype())


@cache
def _promoted(a: str, b: str) -> str:
    return name_of(torch.promote_types(torch_dtype(a), torch_dtype(b)))


def promote(a: Kind, b: Kind, default: str) -> Kind:
    """The kind of what comes of two."""
    if a.weak and b.weak:
        return a if a.is_float or b.dtype == "bool" else b
    if not a.weak and not b.weak:
        return Kind(_promoted(a.dtype, b.dtype))
    weak, strong = (a, b) if a.weak else (b, a)
    if weak.is_float and not strong.is_float:
        return Kind(default)
    if weak.dtype != "bool" and strong.dtype == "bool":
        return Kind("int64")
    return strong


def kinds_of(
    formula: Formula,
    inputs: Sequence[str],
    default: str,
    kind_of_call: Callable[[Step, list[Kind]], Kind],
) -> list[Kind]:
    """The kind of every step, given the dtypes of the arguments.

    Raises
    ------
    TypeError
        An operation of whole numbers (``&``, ``<<``) is given floats.
    """
    kinds: list[Kind] = []
    for step in formula.steps:
        operands = [kinds[i] for i in step.operands]
        kind = _kind(step, operands, inputs, default, kind_of_call)
        if not kind.is_float:
            _check_numbers(step, kind, [formula.steps[i] for i in step.operands])
        kinds.append(kind)
    return kinds


def _check_numbers(step: Step, kind: Kind, operands: list[Step]) -> None:
    """Refuse, as torch does, a number with which an operation has no integer result."""
    if step.op == "pow" and operands[1].op == "const" and operands[1].value < 0:
        raise TypeError(
            f"{kind.dtype} to the power of {operands[1].value} is no integer, as in torch: "
            "use float(...) of the base"
        )
    if step.op in ("select", *EXTREMES) and kind.dtype != "bool":
        info = torch.iinfo(torch_dtype(kind.dtype))
        for operand in operands:
            if operand.op == "const" and not info.min <= operand.value <= info.max:
                raise TypeError(f"{operand.value} does not fit into {kind.dtype}")


def _kind(
    step: Step,
    operands: list[Kind],
    inputs: Sequence[str],
    default: str,
    kind_of_call: Callable[[Step, list[Kind]], Kind],
) -> Kind:
    if step.op == "arg":
        return Kind(inputs[step.value])
    if step.op == "const":
        value = step.value
        number = "bool" if isinstance(value, bool) else "int64"
        return Kind("float64" if isinstance(value, float) else number, weak=True)
    if step.op == "call":
        return kind_of_call(step, operands)
    if step.op in _TRUTHS:
        return Kind("bool")
    if step.op == "int":
        return Kind("int64") if operands[0].is_float or operands[0].dtype == "bool" else operands[0]
    if step.op == "select":
        return promote(operands[1], operands[2], default)
    joined = operands[0]
    for other in operands[1:]:
        joined = promote(joined, other, default)
    if step.op in _WHOLE and joined.is_float:
        raise TypeError(f"{step.op} takes whole numbers, not {joined.dtype}")
    if step.op in _WHOLE or step.op in _SAME:
        if joined.dtype == "bool" and step.op not in _OF_BOOLS:
            raise TypeError(
                f"{step.op} does not take bool, as in torch: use int(...) of it, or &, | and ^"
            )
        return joined
    return joined if joined.is_float else Kind(default, joined.weak)


def settled(kind: Kind, inputs: Sequence[Kind], default: str) -> str:
    """The dtype of a result: a Python float takes that of the inputs, as ``torch.where`` does."""
    if not kind.weak or not kind.is_float:
        return kind.dtype
    for other in inputs:
        kind = promote(kind, other, default)
    return default if kind.weak else kind.dtype


def input_dtypes(tensors: Sequence[torch.Tensor], weak: Sequence[bool]) -> list[str]:
    """The dtypes in which the arguments take part: numbers and 0-d tensors give way, as in torch.

    `weak` says which arguments were Python numbers.
    """
    names = [name_of(t.dtype) for t in tensors]
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
