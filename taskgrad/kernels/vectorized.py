"""A scalar Python function as an operation on tensors: calls, reductions, pickling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch

from taskgrad.kernels.arguments import (
    as_tensor,
    check_derivative,
    check_start,
    dimensions,
    empty_reduced,
    is_integer,
    on_one_device,
    signature_of,
)
from taskgrad.kernels.autograd import custom_op
from taskgrad.kernels.autograd.operation import Operation, Weak
from taskgrad.kernels.autograd.out_argument import OutArgument, copy_to_out
from taskgrad.kernels.autograd.reduction import Reduction
from taskgrad.kernels.autograd.transforms import differentiates
from taskgrad.kernels.explain import Explanation, explain
from taskgrad.kernels.ir.dtypes import dtype_name
from taskgrad.kernels.ir.expression import ScalarFunction, call_of
from taskgrad.kernels.ir.symbols import Symbol, inline
from taskgrad.kernels.ir.tracing import trace
from taskgrad.kernels.runtime.reduce import Reducer

# Other types, torch's fake tensors among them, go through torch's own dispatch.
_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Vectorized:
    """The result of `vectorize`; call it with tensors and numbers that broadcast together.

    Dtypes are promoted as torch does; half precision is computed in float32 and rounded once.
    Arithmetic is torch's: 1 / 0.0 is infinite, integers wrap round, and an integer that is divided
    by 0 with // or % is a RuntimeError. `out=`, a tensor of the result's shape, receives the
    result; this has no gradients.

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
        function: ScalarFunction | None = None,
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
        self._out_argument: OutArgument  # set with the operation
        self._reduction: Reduction | None = None
        self._lock = threading.RLock()

    def __call__(self, *args: Any, out: torch.Tensor | None = None) -> Any:
        if len(args) != self._arity:
            args = self._complete(args)
        if torch.compiler.is_compiling():
            return self._call_in_compile(args, out)
        operation = self._operation or self._trace()
        # One plain loop: small calls spend most of their time here.
        for x in args:
            if type(x) not in _PLAIN or not x.is_cpu or x.is_neg():
                return self._call_generally(args, out)
        if out is not None:
            return self._out_argument(out, args, None)
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

        In the order of the elements, unless the function is known to be commutative: a sum, a
        product, or a bitwise operation of its two arguments.

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
            repeated = self._repeat(x, dim)
            if repeated is not None:
                return repeated
        x = self._operand(x)
        dims = dimensions(dim, x.dim())
        if start is not None:
            check_start(start, x.dtype)
        if x.is_meta:
            return empty_reduced(x, dims, keepdim)
        if any(x.shape[d] == 0 for d in dims):
            if start is None:
                raise ValueError(f"{self.__name__}.reduce of no elements needs start=")
            shape = [size for d, size in enumerate(x.shape) if d not in dims]
            dtype_name(x.dtype)
            result = torch.full(shape, start, dtype=x.dtype)
        else:
            run = _run_outside if torch.compiler.is_compiling() else Vectorized._run
            result = run(self, "reduce", x, dims)
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
        x = self._operand(x)
        if not is_integer(dim):
            raise TypeError(f"scan goes along one dimension: dim must be an integer; got {dim!r}")
        (place,) = dimensions(dim, x.dim()) or (0,)
        if x.is_meta:
            return torch.empty_like(x)
        if x.dim() == 0:
            dtype_name(x.dtype)
            return x.clone()
        run = _run_outside if torch.compiler.is_compiling() else Vectorized._run
        return run(self, "scan", x.movedim(place, -1)).movedim(-1, place)

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
        self._check_binary("outer")
        for operand in (x, y):
            if not isinstance(operand, torch.Tensor):
                raise TypeError(
                    f"{self.__name__}.outer takes two tensors; got {type(operand).__name__}"
                )
        return self(x.reshape(*x.shape, *[1] * y.dim()), y)

    @property
    def unsupported(self) -> str:
        """Why the function could not be traced to an expression; empty if it could."""
        self._trace()
        assert self._function is not None
        return self._function.unsupported

    def explain(self) -> Explanation:
        """What was compiled and vectorised, access patterns, threads and GB/s of the last calls.

        Examples
        --------
        >>> import torch, taskgrad as tg
        >>> double = tg.vectorize(lambda x: 2 * x)
        >>> double(torch.ones(3))
        tensor([2., 2., 2.])
        >>> double.explain().kernels[0].signature
        '(float32) -> float32'
        """
        operation = self._trace()
        reducer = self._reduction.reducer if self._reduction else None
        return explain(operation, reducer, self.__name__, self.unsupported)

    def __repr__(self) -> str:
        return f"<vectorized {self.__name__}>"

    def __reduce__(self) -> Any:
        """Pickle the traced function; unpickling needs no source."""
        self._trace()
        return _unpickle, (self._function, self._arity, self._defaults)

    def _trace(self) -> Operation:
        with self._lock:
            if self._operation is None:
                if self._function is None:
                    assert self._fn is not None
                    self._function = trace(self._fn, self._derivative, self._arity, self.__name__)
                expression = call_of(self._function, self._arity)
                operation = Operation(expression, self.__name__, self._key)
                self._out_argument = OutArgument(operation.launcher)
                self._operation = operation
            return self._operation

    def _check_binary(self, method: str) -> None:
        if self._arity != 2:
            raise TypeError(
                f"{method} is for functions of two arguments; {self.__name__} takes {self._arity}"
            )

    def _operand(self, x: torch.Tensor) -> torch.Tensor:
        self._check_binary("reducing")
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{self.__name__} reduces a tensor; got {type(x).__name__}")
        return as_tensor(self.__name__, x)

    def _repeat(self, x: Any, dim: Any) -> torch.Tensor | None:
        """The reduction of a plain tensor, if there has been one like it."""
        if torch.compiler.is_compiling() or self._reduction is None or type(x) not in _PLAIN:
            return None
        if not (dim is None or type(dim) is int) or not x.is_cpu or x.is_neg():
            return None
        if x.layout is not torch.strided or x.is_nested:
            return None
        return None if differentiates((x,)) else self._reduction.reducer.repeat(x, dim)

    def _run(self, method: str, *args: Any) -> torch.Tensor:
        """Reduce or scan."""
        return getattr(self._make_reduction(), method)(*args)

    def _make_reduction(self) -> Reduction:
        operation = self._trace()
        with self._lock:
            if self._reduction is None:
                reducer = Reducer(operation.expression, self.__name__)
                self._reduction = Reduction(
                    reducer, lambda x: operation.derived("pullback", (0, 1))(x)
                )
            return self._reduction

    def _complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = self._arity - len(args)
        if not 0 <= missing <= len(self._defaults):
            raise TypeError(f"{self.__name__} takes {self._arity} arguments; got {len(args)}")
        return args + self._defaults[len(self._defaults) - missing :]

    def _call_generally(self, args: tuple[Any, ...], out: torch.Tensor | None) -> Any:
        """A call with numbers, with symbols of a function being traced, or with other tensors."""
        operation = self._trace()
        if any(isinstance(x, Symbol) for x in args):
            if out is not None:
                raise TypeError(
                    f"{self.__name__}: out= has no place in a function that is compiled"
                )
            return inline(operation.expression, args)
        weak = tuple(not isinstance(x, torch.Tensor) for x in args)
        tensors = [as_tensor(self.__name__, x) for x in args]
        if any(type(x) not in _PLAIN or x.is_meta for x in tensors):
            return self._dispatch(on_one_device(self.__name__, tensors), weak, out)
        if out is not None:
            return self._out_argument(out, tensors, weak)
        return operation(tensors, weak)[0]

    def _call_in_compile(self, args: tuple[Any, ...], out: torch.Tensor | None) -> Any:
        # torch.compile traces this, so it is plain code.
        if self._operation is None:
            _trace_outside(self)
        weak = tuple([not isinstance(x, torch.Tensor) for x in args])
        tensors = [
            x if isinstance(x, torch.Tensor)
            else torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.tensor(x)
            for x in args
        ]  # fmt: skip
        return self._dispatch(tensors, weak, out)

    def _dispatch(self, tensors: list[torch.Tensor], weak: Weak, out: torch.Tensor | None) -> Any:
        """A call through torch's dispatcher, for subclasses, meta tensors and torch.compile."""
        result = custom_op.elementwise(self._key, tensors, weak)[0]
        return result if out is None else copy_to_out(self.__name__, result, out)


# torch.compile does not trace into these.
_trace_outside = torch.compiler.disable(Vectorized._trace)
_run_outside = torch.compiler.disable(Vectorized._run)


def _unpickle(function: ScalarFunction, arity: int, defaults: tuple[Any, ...]) -> Vectorized:
    return Vectorized(None, function=function, arity=arity, defaults=defaults)
