"""A scalar Python function as an operation on tensors: what a call and a pickle do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch

from taskgrad.kernels.arguments import (
    check_derivative,
    check_start,
    copied,
    dimensions,
    is_integer,
    signature_of,
    without,
)
from taskgrad.kernels.autograd import custom_op
from taskgrad.kernels.autograd.operation import Operation, differentiates
from taskgrad.kernels.autograd.reduction import Reduction
from taskgrad.kernels.explain import Explanation, explain
from taskgrad.kernels.ir import tracing
from taskgrad.kernels.ir.dtypes import name_of
from taskgrad.kernels.ir.expression import Function, called
from taskgrad.kernels.ir.symbols import Symbol
from taskgrad.kernels.out_argument import Into
from taskgrad.kernels.runtime.memory import unreadable

# Tensors of other types, torch's fake ones among them, go through torch's own dispatch.
_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Vectorized:
    """What `vectorize` makes: call it with tensors and numbers that broadcast together.

    Dtypes are promoted as torch does; half precision is computed in float32 and rounded once.
    Arithmetic is torch's: 1 / 0.0 is infinite, integers wrap round, and an integer that is divided
    by 0 with // or % is a RuntimeError. With `out=`, of the result's shape, the result is written
    there; that has no gradients.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> add = tg.vectorize(lambda a, b: a + b)
    >>> add(torch.ones(2, 1), torch.tensor([1, 2, 3]))
    tensor([[2., 3., 4.],
            [2., 3., 4.]])
    >>> add(torch.ones(2), 1, out=torch.zeros(2))
    tensor([2., 2.])
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        derivative: Callable[..., Any] | None = None,
        *,
        function: Function | None = None,
        arity: int = 0,
        defaults: tuple[Any, ...] = (),
    ) -> None:
        self._fn, self._derivative = fn, derivative
        self._function, self._arity, self._defaults = function, arity, defaults
        if fn is not None:
            if isinstance(fn, Vectorized):
                self._arity, self._defaults = fn._arity, fn._defaults
            else:
                self._arity, self._defaults = signature_of(fn)
            if derivative is not None:
                check_derivative(derivative, self._arity)
            self.__doc__ = fn.__doc__
            self.__module__ = fn.__module__
            self.__wrapped__ = fn  # for inspect: its signature is the function's
        self.__name__ = getattr(fn, "__name__", "") if function is None else function.name
        self._key = uuid4().hex
        self._operation: Operation | None = None
        self._into: Callable[..., torch.Tensor]  # with the operation
        self._folds: Reduction | None = None
        self._lock = threading.RLock()

    def __call__(self, *args: Any, out: torch.Tensor | None = None) -> Any:
        if len(args) != self._arity:
            args = self._complete(args)
        if torch.compiler.is_compiling():
            return self._compiling(args, out)
        operation = self._operation or self._read()
        # One plain loop over the arguments: what a small call takes is mostly this.
        for x in args:
            if type(x) not in _PLAIN or not x.is_cpu or x.is_neg():
                return self._slowly(args, out)
        if out is not None:
            return self._into(out, args, None)
        if differentiates(args):
            return operation(args)[0]
        return operation.launcher.run(args)[0]

    def reduce(
        self,
        x: torch.Tensor,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
        start: float | None = None,
    ) -> torch.Tensor:
        """Combine the elements along dimensions; for associative functions.

        In the order of the elements, unless the function is known not to care: a sum, a product, or
        a bitwise operation of its two arguments.

        Parameters
        ----------
        x : tensor
        dim : int, sequence of int, or None
            None: over all of them.
        keepdim : bool
            Keep the dimensions, with size 1.
        start : number or None
            Combined with each result, from the left; the result where there are no elements.

        Returns
        -------
        tensor
            Of the dtype of `x`, the same bits whatever the number of threads.

        Raises
        ------
        ValueError
            There are no elements and no `start`.

        Examples
        --------
        >>> import torch, taskgrad as tg
        >>> add = tg.vectorize(lambda a, b: a + b)
        >>> add.reduce(torch.tensor([[2.0, 3.0], [4.0, 6.0], [5.0, 7.0]]), dim=0)
        tensor([11., 16.])
        """
        if not isinstance(keepdim, bool):
            raise TypeError(f"keepdim must be True or False; got {keepdim!r}")
        if start is None and not keepdim:
            known = self._reduced_again(x, dim)
            if known is not None:
                return known
        x = self._of_two(x)
        dims = dimensions(dim, x.dim())
        if start is not None:
            check_start(start, x.dtype)
        if x.is_meta:
            return without(x, dims, keepdim)
        if any(x.shape[d] == 0 for d in dims):
            if start is None:
                raise ValueError(f"{self.__name__}.reduce of no elements needs start=")
            shape = [size for d, size in enumerate(x.shape) if d not in dims]
            name_of(x.dtype)
            result = torch.full(shape, start, dtype=x.dtype)
        else:
            result = _outside_of_graphs(self._reduction, "fold", x, dims)
            if start is not None:
                result = self(start, result)
        for d in dims if keepdim else ():
            result = result.unsqueeze(d)
        return result

    def scan(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The running results along a dimension: the first, the first two combined, ...

        Parameters
        ----------
        x : tensor
        dim : int

        Returns
        -------
        tensor
            Of the shape and dtype of `x`, the same bits whatever the number of threads.

        Examples
        --------
        >>> import torch, taskgrad as tg
        >>> larger = tg.vectorize(lambda a, b: a if a > b else b)
        >>> larger.scan(torch.tensor([3, 1, 4, 1, 5]))
        tensor([3, 3, 4, 4, 5])
        """
        x = self._of_two(x)
        if not is_integer(dim):
            raise TypeError(f"scan goes along one dimension: dim must be an integer; got {dim!r}")
        (place,) = dimensions(dim, x.dim()) or (0,)
        if x.is_meta:
            return torch.empty_like(x)
        if x.dim() == 0:
            name_of(x.dtype)
            return x.clone()
        moved = x.movedim(place, -1)
        return _outside_of_graphs(self._reduction, "scan", moved).movedim(-1, place)

    def outer(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The function of every element of `x` with every element of `y`.

        Returns
        -------
        tensor
            Of shape ``x.shape + y.shape``.

        Examples
        --------
        >>> import torch, taskgrad as tg
        >>> times = tg.vectorize(lambda a, b: a * b)
        >>> times.outer(torch.arange(3), torch.arange(2))
        tensor([[0, 0],
                [0, 1],
                [0, 2]])
        """
        self._needs_two("outer")
        for operand in (x, y):
            if not isinstance(operand, torch.Tensor):
                raise TypeError(
                    f"{self.__name__}.outer takes two tensors; got {type(operand).__name__}"
                )
        result: torch.Tensor = self(x.reshape(*x.shape, *[1] * y.dim()), y)
        return result

    @property
    def obstacle(self) -> str:
        """Why the function could not be read as a formula; empty if it could."""
        self._read()
        assert self._function is not None
        return self._function.obstacle

    def explain(self) -> Explanation:
        """What was compiled, how memory lay, what was vectorised, threads, GB/s of the last calls.

        Examples
        --------
        >>> import torch, taskgrad as tg
        >>> double = tg.vectorize(lambda x: 2 * x)
        >>> double(torch.ones(3))
        tensor([2., 2., 2.])
        >>> double.explain().kernels[0].signature
        '(float32) -> float32'
        """
        operation = self._read()
        folder = self._folds.folder if self._folds else None
        return explain(operation, folder, self.__name__, self.obstacle)

    def __repr__(self) -> str:
        return f"<vectorized {self.__name__}>"

    def __reduce__(self) -> Any:
        """As what was read of it: the source need not be there where it arrives."""
        self._read()
        return _again, (self._function, self._arity, self._defaults)

    def _read(self) -> Operation:
        with self._lock:
            if self._operation is None:
                if self._function is None:
                    assert self._fn is not None
                    self._function = _read(self._fn, self._derivative, self._arity, self.__name__)
                formula = called(self._function, self._arity)
                operation = Operation(formula, self.__name__, self._key)
                self._into = Into(operation.launcher)
                self._operation = operation
            return self._operation

    def _needs_two(self, way: str) -> None:
        if self._arity != 2:
            raise TypeError(
                f"{way} is for functions of two arguments; {self.__name__} takes {self._arity}"
            )

    def _of_two(self, x: torch.Tensor) -> torch.Tensor:
        self._needs_two("reducing")
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{self.__name__} reduces a tensor; got {type(x).__name__}")
        return self._tensor(x)

    def _reduced_again(self, x: Any, dim: Any) -> torch.Tensor | None:
        """A reduction of a plain tensor like an earlier one; None where there was none."""
        if torch.compiler.is_compiling() or self._folds is None or type(x) not in _PLAIN:
            return None
        if not (dim is None or type(dim) is int) or not x.is_cpu or x.is_neg():
            return None
        if x.layout is not torch.strided or x.is_nested:
            return None
        return None if differentiates((x,)) else self._folds.folder.again(x, dim)

    def _reduction(self) -> Reduction:
        operation = self._read()
        with self._lock:
            if self._folds is None:
                self._folds = Reduction(operation)
            return self._folds

    def _complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = self._arity - len(args)
        if not 0 <= missing <= len(self._defaults):
            raise TypeError(f"{self.__name__} takes {self._arity} arguments; got {len(args)}")
        return args + self._defaults[len(self._defaults) - missing :]

    def _slowly(self, args: tuple[Any, ...], out: torch.Tensor | None) -> Any:
        """Numbers, symbols of a function being read, tensors that are not plain ones of the CPU."""
        operation = self._read()
        if any(isinstance(x, Symbol) for x in args):
            if out is not None:
                raise TypeError(
                    f"{self.__name__}: out= has no place in a function that is compiled"
                )
            return _inlined(operation, args)
        weak = tuple(not isinstance(x, torch.Tensor) for x in args)
        tensors = [self._tensor(x) for x in args]
        if any(type(x) not in _PLAIN or x.is_meta for x in tensors):
            # A tensor subclass, or no values at all: torch's own dispatch knows what to do.
            tensors = self._on_one_device(tensors)
            result = custom_op.elementwise(self._key, tensors, weak)[0]
            return result if out is None else copied(self.__name__, result, out)
        if out is not None:
            return self._into(out, tensors, weak)
        return operation(tensors, weak)[0]

    def _on_one_device(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """As torch: beside tensors on meta only those without dimensions may be elsewhere."""
        if not any(x.is_meta for x in tensors):
            return tensors
        if any(not x.is_meta and x.dim() for x in tensors):
            raise ValueError(
                f"{self.__name__} got tensors on meta and on the CPU: they must be on one device"
            )
        return [x.to("meta") for x in tensors]

    def _tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            if value.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"{self.__name__} runs on the CPU; got a tensor on {value.device}: "
                    "use x.cpu(), or torch's own operations there"
                )
            if value.layout is not torch.strided or value.is_nested:
                raise unreadable(self.__name__, [value])
            return value.resolve_neg()
        if isinstance(value, bool | int | float):
            if not (isinstance(value, float) or -(2**63) <= value < 2**63):
                raise ValueError(
                    f"{self.__name__} got {value}, which does not fit into 64 bits: pass a float"
                )
            return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        raise TypeError(f"{self.__name__} takes tensors and numbers; got {type(value).__name__}")

    def _compiling(self, args: tuple[Any, ...], out: torch.Tensor | None) -> Any:
        # torch.compile reads this: plain code only.
        if self._operation is None:
            _read_outside(self)
        weak = [not isinstance(x, torch.Tensor) for x in args]
        tensors = [
            x
            if isinstance(x, torch.Tensor)
            else torch.tensor(x, dtype=torch.float64)
            if isinstance(x, float)
            else torch.tensor(x)
            for x in args
        ]
        result = custom_op.elementwise(self._key, tensors, weak)[0]
        return result if out is None else copied(self.__name__, result, out)


@torch.compiler.disable
def _read_outside(vectorized: Vectorized) -> None:
    vectorized._read()


def _outside_of_graphs(reduction: Callable[[], Reduction], way: str, *args: Any) -> torch.Tensor:
    """A reduction or scan; torch.compile does not look into it."""
    if torch.compiler.is_compiling():
        return _disabled(reduction, way, *args)
    result: torch.Tensor = getattr(reduction(), way)(*args)
    return result


@torch.compiler.disable
def _disabled(reduction: Callable[[], Reduction], way: str, *args: Any) -> torch.Tensor:
    result: torch.Tensor = getattr(reduction(), way)(*args)
    return result


def _again(function: Function, arity: int, defaults: tuple[Any, ...]) -> Vectorized:
    return Vectorized(None, function=function, arity=arity, defaults=defaults)


def _inlined(operation: Operation, args: tuple[Any, ...]) -> Symbol:
    symbol = next(x for x in args if isinstance(x, Symbol))
    places = [symbol.place_of(x) for x in args]
    (place,) = symbol.writer.insert(operation.formula, places)
    return Symbol(symbol.writer, place, symbol.decide)


def _read(
    fn: Callable[..., Any], derivative: Callable[..., Any] | None, arity: int, name: str
) -> Function:
    found = tracing.read(fn, arity, name)
    if derivative is None:
        return found
    given = tracing.read_derivative(derivative, arity, f"the derivative of {name}")
    return Function(name, found.formula, found.plain, found.obstacle, given)
