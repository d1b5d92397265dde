"""The operators and torch functions of a sharded tensor, which give another one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Self

import torch

from taskgrad.graph.objects import Opaque
from taskgrad.graph.pytree import flatten
from taskgrad.spmd.sharded import elementwise
from taskgrad.spmd.sharded.layout import Parts

_NUMBERS = (bool, int, float, complex)
_REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "all", "any")


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method for an operator of Python."""

    def method(self: Operators, *other: Any) -> Any:
        if not isinstance(other[0] if other else self, (Operators, torch.Tensor, *_NUMBERS)):
            return NotImplemented
        return _elementwise(type(self), function, self, *other)

    return method


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method for an operator whose left operand is a number; that of a tensor asks torch's."""

    def method(self: Operators, other: Any) -> Any:
        if isinstance(other, _NUMBERS):
            return _elementwise(type(self), function, other, self)
        return NotImplemented

    return method


class Operators(Opaque):
    """A handle of a sharded tensor, as an operand.

    `held` is what the tensor is, as data; for taskgrad itself.
    """

    __slots__ = ("__weakref__", "held")

    __array_ufunc__ = None  # an array and a sharded tensor: ours is asked, and refuses

    def __init__(self, held: Parts) -> None:
        self.held = held

    __add__, __radd__ = _operator(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _operator(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _operator(operator.mod), _reflected(operator.mod)
    __pow__, __rpow__ = _operator(operator.pow), _reflected(operator.pow)
    __and__, __rand__ = _operator(operator.and_), _reflected(operator.and_)
    __or__, __ror__ = _operator(operator.or_), _reflected(operator.or_)
    __xor__, __rxor__ = _operator(operator.xor), _reflected(operator.xor)
    __lt__, __le__ = _operator(operator.lt), _operator(operator.le)
    __gt__, __ge__ = _operator(operator.gt), _operator(operator.ge)
    __eq__ = _operator(operator.eq)
    __ne__ = _operator(operator.ne)
    __neg__, __pos__ = _operator(operator.neg), _operator(operator.pos)
    __abs__, __invert__ = _operator(operator.abs), _operator(operator.invert)
    __hash__ = Opaque.__hash__

    def __copy__(self) -> Self:
        return self  # nothing changes it

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ShardedTensor cannot be pickled: its parts are on the workers of this driver's "
            "client. Give it to a tg.pmap as an argument, not in what the function closes over; "
            "save it with .save(folder), or .gather() it first"
        )

    def __getattr__(self, name: str) -> Any:
        if name in elementwise.NAMES and not name.startswith("_"):
            return functools.partial(_elementwise, type(self), elementwise.method(name), self)
        raise AttributeError(
            f"a ShardedTensor has no attribute {name!r}: it has elementwise functions, reductions "
            "and basic indexing. Use a tg.pmap for the rest, or .gather()"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name.removeprefix("special_") in elementwise.NAMES:
            return _elementwise(cls, func, *args, **kwargs)
        if name in _REDUCTIONS and args and isinstance(args[0], Operators):
            return getattr(args[0], name)(*args[1:], **kwargs)
        raise TypeError(
            f"{name} of a sharded tensor is not one of the elementwise functions and reductions "
            "that run where its parts are. Use it inside a tg.pmap, or take .gather()"
        )


def _elementwise(
    kind: type[Operators], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Operators:
    leaves, structure = flatten((args, kwargs))
    given = [leaf.held if isinstance(leaf, Operators) else leaf for leaf in leaves]
    return kind(elementwise.elementwise(function, *structure.build(given)))
