"""Elementwise functions of sharded tensors: each part is computed where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch

from taskgrad.errors import TaskgradError
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pack import pickle_or_explain
from taskgrad.graph.pytree import Slot, Structure, describe, flatten
from taskgrad.spmd.sharded.layout import Part, Parts, along, shape_of
from taskgrad.spmd.sharded.running import call, described, kept, view
from taskgrad.worker import tensor_parts

# As torch names them; of a tensor's methods and of torch.special too.
NAMES = frozenset(
    """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2
    arctanh asin asinh atan atan2 atanh bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool
    ceil celu clamp clamp_max clamp_min clip conj_physical copysign cos cosh deg2rad digamma div
    divide double elu eq erf erfc erfinv exp exp2 expit expm1 fix float float_power floor
    floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt half hardsigmoid hardswish
    hardtanh heaviside hypot int isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu
    lerp less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and
    logical_not logical_or logical_xor logit long lt masked_fill maximum minimum mish mul multiply
    nan_to_num ne neg negative nextafter not_equal positive pow rad2deg reciprocal relu relu6
    remainder round rsqrt rsub selu sgn short sigmoid sign signbit silu sin sinc sinh softplus
    softsign sqrt square sub subtract tan tanh threshold _threshold true_divide trunc where xlogy
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __div__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __and__ __rand__ __or__ __ror__
    __xor__ __rxor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __neg__ __pos__ __abs__ __invert__
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class _Operands:
    """The arguments of a function, those that are tensors apart.

    `tensors` are sharded ones and tensors, in the order of the slots among the `leaves`. `axis` is
    that along which the sharded ones are cut, counted from the last dimension, and `first` has the
    parts that the result gets; with the axis None all sharded ones are copies.
    """

    leaves: list[Any]
    structure: Structure
    tensors: list[Parts | torch.Tensor]
    first: Parts
    axis: int | None


def elementwise(function: Callable[..., Any], args: Any, kwargs: Any) -> Parts:
    """The function of these arguments, some of which are sharded; with the broadcasting of torch.

    Raises TypeError or RuntimeError as torch does for tensors of these shapes and dtypes;
    ValueError if the sharded ones lie differently; TaskgradError if a tensor takes a gradient.
    """
    name = str(getattr(function, "__name__", function))
    found = _operands(name, args, kwargs)
    given = [t.meta() if isinstance(t, Parts) else _meta(t) for t in found.tensors]
    metas = [given[x.index] if type(x) is Slot else x for x in found.leaves]
    meta_args, meta_kwargs = found.structure.build(metas)
    try:
        with torch.no_grad():
            result = function(*meta_args, **meta_kwargs)
    except NotImplementedError as error:  # as nonzero, which where is with one argument
        raise TypeError(
            f"{name} of these arguments is not elementwise: its shape depends on values"
        ) from error
    _check_result(name, result, found)
    axis = None if found.axis is None else result.ndim + found.axis
    data = pickle_or_explain(
        lambda: bytes(cloudpickle.dumps((function, found.leaves, found.structure))),
        f"an argument of {name}",
    )
    whole: dict[int, Leaf] = {}
    calls = []
    for part in found.first.parts:
        calls.append(
            call(
                tensor_parts.apply,
                part,
                [_operand(t, found, part, whole) for t in found.tensors],
                title=name.strip("_"),
                name=name,
                call=data,
                shape=shape_of(result.shape, axis, part),
                dtype=result.dtype,
            )
        )
    parts = kept(found.first.session, found.first.spans, calls)
    return Parts(found.first.session, result.shape, result.dtype, axis, tuple(parts))


def mapped(x: Parts, function: Callable[..., Any]) -> Parts:
    """A user's function of each part; it gives a tensor of the same shape."""
    title = getattr(function, "__name__", type(function).__name__).strip("<>")
    data = pickle_or_explain(lambda: bytes(cloudpickle.dumps(function)), repr(title))
    seed = int(torch.randint(2**62, (), device="cpu"))
    calls = [
        call(
            tensor_parts.apply_mapped,
            part,
            [view(part)],
            title="map",
            call=data,
            name=title,
            seed=seed,
            start=part.start,
        )
        for part in x.parts
    ]
    parts, found = described(x.session, x.spans, calls)
    dtypes = {info.dtype for info in found}
    if len(dtypes) > 1:
        raise ValueError(f"{title!r} gave parts of different dtypes: {sorted(map(str, dtypes))}")
    return Parts(x.session, x.shape, dtypes.pop(), x.axis, tuple(parts))


def _operands(name: str, args: Any, kwargs: Any) -> _Operands:
    if kwargs.get("out") is not None or kwargs.get("inplace") is True:
        raise TypeError(f"{name} cannot write to a sharded tensor: use the value that it gives")
    leaves, structure = flatten((args, kwargs))
    tensors: list[Parts | torch.Tensor] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Parts | torch.Tensor):
            leaves[i] = Slot(len(tensors))
            tensors.append(leaf)
            if isinstance(leaf, torch.Tensor):
                _check_tensor(name, leaf)
    sharded = [t for t in tensors if isinstance(t, Parts)]
    cut = [t for t in sharded if t.axis is not None]
    first = (cut or sharded)[0]
    axis = None if first.axis is None else first.axis - len(first.shape)
    for other in sharded:
        _check_layout(name, first, axis, other)
    return _Operands(leaves, structure, tensors, first, axis)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TaskgradError(
            f"{name} of a sharded tensor and one that takes a gradient: sharded tensors carry none "
            "to the driver. Use torch.no_grad() or .detach(), or take gradients inside a tg.pmap "
            "(torch.func.grad)"
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} of a sharded tensor takes dense tensors with values; got {describe(tensor)}"
        )


def _check_layout(name: str, first: Parts, axis: int | None, other: Parts) -> None:
    """Raise unless what is needed of a sharded tensor is where the parts of the first one are."""
    if other.session is not first.session:
        raise TaskgradError(f"{name}: sharded tensors of two clients meet in one call")
    if other.axis is None:
        there = {part.worker.address for part in other.parts}
        fits = all(part.worker.address in there for part in first.parts)
    else:
        fits = other.axis - len(other.shape) == axis and other.spans == first.spans
    if not fits:
        raise ValueError(
            f"{name}: these sharded tensors lie differently on the workers: {first} has "
            f"{_lies(first)}, and {other} {_lies(other)}. Lay them out alike first: "
            "y.reshard(axis) with the axis of x, or both"
        )


def _lies(x: Parts) -> str:
    if x.axis is None:
        return "copies on " + ", ".join(part.worker.short for part in x.parts)
    held = ", ".join(f"{part.start}:{part.stop} on {part.worker.short}" for part in x.parts)
    return f"axis {x.axis} cut as {held}"


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _check_result(name: str, result: Any, found: _Operands) -> None:
    """Raise unless this is a tensor of the broadcast shape, with the axis of the parts as it is."""
    shape = torch.broadcast_shapes(*[t.shape for t in found.tensors])
    if not isinstance(result, torch.Tensor) or result.shape != shape:
        raise TypeError(
            f"{name} of these arguments is not elementwise: it gives {describe(result)}"
        )
    first, axis = found.first, found.axis
    if axis is not None and result.shape[axis] != first.shape[axis]:
        raise ValueError(
            f"{name}: {first} is cut along an axis of length {first.shape[axis]}, and would be "
            f"broadcast there to {result.shape[axis]}. Reshard it: x.reshard(None)"
        )


def _operand(
    tensor: Parts | torch.Tensor, found: _Operands, part: Part, whole: dict[int, Leaf]
) -> Node:
    """What the call at one part takes of a tensor."""
    axis = found.axis
    long = axis is not None and -axis <= len(tensor.shape) and tensor.shape[axis] != 1
    here = along(None if axis is None else len(tensor.shape) + axis, part.start, part.stop)
    if isinstance(tensor, Parts):
        if tensor.axis is not None:
            of = next(p for p in tensor.parts if p.span == part.span)
            return view(of)
        of = next(p for p in tensor.parts if p.worker.address == part.worker.address)
        return view(of, here if long else ())
    if long:
        return Leaf(tensor.detach()[here], needs_grad=False)
    if id(tensor) not in whole:
        whole[id(tensor)] = Leaf(tensor.detach(), needs_grad=False)
    return whole[id(tensor)]


def method(name: str) -> Callable[..., Any]:
    """Torch's function behind a method of tensors; AttributeError if there is no such one."""
    found: Callable[..., Any] = getattr(torch.Tensor, name)
    return found
