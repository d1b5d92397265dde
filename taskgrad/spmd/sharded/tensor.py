"""ShardedTensor: a tensor whose parts are on workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from distributed import Client

from taskgrad.cluster.session import WorkerSpec, session
from taskgrad.display.parts import Held, drawn, in_words
from taskgrad.spmd.sharded import elementwise, files, making
from taskgrad.spmd.sharded.indexing import indexed
from taskgrad.spmd.sharded.layout import Part, Parts, Sharded, axis_of, chosen, spans_over
from taskgrad.spmd.sharded.operators import Operators
from taskgrad.spmd.sharded.reducing import reduction
from taskgrad.spmd.sharded.resharding import resharded
from taskgrad.spmd.sharded.running import gathered


class ShardedTensor(Operators):
    """A tensor whose parts stay on workers, cut along one axis, or with a copy on each of them.

    Made by `pmap` with ``out_axes=tg.Sharded(axis)`` or ``gather=False``, by `shard`, `from_dask`,
    `from_delayed` and `load_sharded`. Given to `pmap`, it is read where it is: with the axis that
    is mapped cut as the ranks are placed, and with None for ``in_axes`` as copies, nothing is sent.
    Otherwise pieces go from worker to worker.

    Elementwise functions and operators, of it with numbers, tensors and sharded tensors that lie
    alike, are computed where the parts are, with the shapes and dtypes of torch; so is basic
    indexing. They run at once, and the result is there when they return. Nothing changes a sharded
    tensor. It has no gradient: take gradients inside a `pmap` (``torch.func.grad``).

    The numbers are those of torch for each part. Torch rounds a few functions (``pow``, ``sinh``)
    in another way where a row ends than within it, so the last bit may be another one than for the
    whole.

    The workers keep the parts until the sharded tensor is garbage here.

    Raises
    ------
    WorkerLostError
        On use: a worker that had a part is gone, or was restarted.
    TaskgradError
        On use: the client is closed.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> x = tg.shard(torch.arange(6.0).reshape(2, 3))
    >>> y = x * 2 + torch.ones(3)
    >>> y.shape, y.sum()
    (torch.Size([2, 3]), tensor(36.))
    >>> y[:, 0].gather()
    tensor([1., 7.])
    """

    __slots__ = ()

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole."""
        return self.held.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parts."""
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        """Where a worker has its part: in the memory of its host."""
        return torch.device("cpu")

    @property
    def layout(self) -> Sharded:
        """The axis along which it is cut, from 0; ``Sharded(None)`` if each part is a copy."""
        return Sharded(self.held.axis)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Who holds what: a `worker` each, with the `start` and `stop` of its part of the axis."""
        return self.held.parts

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole, once."""
        return self.numel() * self.dtype.itemsize

    @property
    def requires_grad(self) -> bool:
        """False: sharded tensors carry no gradient."""
        return False

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def gather(self) -> torch.Tensor:
        """The tensor, on the driver."""
        return gathered(self.held)

    def item(self) -> Any:
        """The number in a tensor of one element.

        Raises RuntimeError if there are more.
        """
        if self.numel() != 1:
            raise RuntimeError(
                f"a sharded tensor of {self.numel()} elements is not one number: index or reduce "
                "it first, or use .gather()"
            )
        return self.gather().item()

    def reshard(
        self, axis: Any = 0, *, workers: Sequence[WorkerSpec] | None = None
    ) -> ShardedTensor:
        """The same tensor in another layout; pieces go from worker to worker.

        Parameters
        ----------
        axis
            That along which it shall be cut, or None for a copy on each worker.
        workers
            Indices, names or addresses; by default all.

        Raises
        ------
        ValueError
            There is no such axis.
        PlacementError
            There is no such worker.
        """
        held = self.held
        to = axis_of(axis, self.ndim, str(held))
        spans = spans_over(chosen(workers, held.session), held.shape, to)
        return ShardedTensor(resharded(held, to, spans))

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> ShardedTensor:
        """An elementwise function of your own: it gets each part, and gives one of its shape.

        Random numbers are drawn from streams that ``torch.manual_seed`` on the driver fixes.

        Raises
        ------
        LayerError
            `fn` raised; or gave something else than a tensor of the part's shape, or one that
            takes a gradient.
        TypeError
            `fn` cannot be pickled.
        """
        return ShardedTensor(elementwise.mapped(self.held, fn))

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        """The sum over all dimensions, or those in `dim`.

        It stays sharded unless it is over all dimensions or that along which the parts are cut:
        then it is a tensor on the driver. There each part is summed by torch, in float32 if it is
        float16 or bfloat16, and the sums are added in the order of the parts: so with the same
        parts it has the same bits every time. Those of torch's sum of the whole differ by rounding,
        by about 1e-6 of the sum of absolute values in float32.
        """
        return self._reduced("sum", dim, keepdim, dtype=dtype)

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        """The mean over all dimensions, or those in `dim`; as `sum`."""
        return self._reduced("mean", dim, keepdim, dtype=dtype)

    def amax(self, dim: Any = None, keepdim: bool = False) -> Any:
        """The largest over all dimensions, or those in `dim`; it stays sharded as `sum` does."""
        return self._reduced("amax", dim, keepdim)

    def amin(self, dim: Any = None, keepdim: bool = False) -> Any:
        """The smallest over all dimensions, or those in `dim`; it stays sharded as `sum` does."""
        return self._reduced("amin", dim, keepdim)

    def max(self) -> Any:
        """The largest element."""
        return self.amax()

    def min(self) -> Any:
        """The smallest element."""
        return self.amin()

    def all(self, dim: Any = None, keepdim: bool = False) -> Any:
        """Whether all are true, over all dimensions or those in `dim`."""
        return self._reduced("all", dim, keepdim)

    def any(self, dim: Any = None, keepdim: bool = False) -> Any:
        """Whether any is true, over all dimensions or those in `dim`."""
        return self._reduced("any", dim, keepdim)

    def norm(self, p: float = 2, dim: Any = None, keepdim: bool = False) -> Any:
        """The vector norm of order `p` over all dimensions, or those in `dim`; rounds as `sum`."""
        return self._reduced("norm", dim, keepdim, ord=p)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a folder, each worker its part, as safetensors; for `load_sharded`.

        A sharded tensor that is in the folder is replaced once all is written.

        Raises
        ------
        CheckpointError
            The folder cannot be written, or is not on a filesystem that the driver and all workers
            share.
        """
        files.save(self.held, folder)

    def to_dask(self) -> Any:
        """A ``dask.array.Array`` whose chunks are the parts, which stay where they are.

        Raises
        ------
        TypeError
            NumPy has no such dtype, as it has no bfloat16.
        """
        return making.to_dask_array(self.held)

    @staticmethod
    def from_dask(
        array: Any,
        axis: Any = 0,
        *,
        workers: Sequence[WorkerSpec] | None = None,
        client: Client | None = None,
    ) -> ShardedTensor:
        """Compute a ``dask.array.Array`` into a sharded tensor, not by way of the driver.

        Parameters
        ----------
        array
            With chunks of known sizes; it may be chunked in any way.
        axis, workers
            As for `shard`.
        client
            By default the current one.

        Raises
        ------
        TypeError
            It is not a Dask array; or torch has no such dtype.
        ValueError
            It has no such axis, or chunks of unknown sizes.
        """
        return ShardedTensor(making.of_dask_array(array, axis, workers, session(client)))

    @staticmethod
    def from_delayed(
        values: Sequence[Any],
        axis: int = 0,
        *,
        workers: Sequence[WorkerSpec] | None = None,
        client: Client | None = None,
    ) -> ShardedTensor:
        """Compute ``dask.delayed`` values and join them along an axis, on the workers.

        Parameters
        ----------
        values
            Of arrays, tensors, or partitions of a dataframe (``df.to_delayed()``), alike in all
            dimensions but `axis`. Neighbours go to one worker.
        axis
            That along which they follow one another.
        workers
            As for `shard`.
        client
            By default the current one.

        Raises
        ------
        TypeError
            These are no delayed values; or torch has no such dtype.
        ValueError
            The values differ in dtype or in another dimension than `axis`.
        """
        return ShardedTensor(making.of_delayed(values, axis, workers, session(client)))

    def _reduced(self, name: str, dim: Any, keepdim: Any, **options: Any) -> Any:
        found = reduction(self.held, name, dim, keepdim, **options)
        return ShardedTensor(found) if isinstance(found, Parts) else found

    def _parts_shown(self) -> list[Held]:
        size = self.dtype.itemsize
        found = []
        for part in self.parts:
            shape = self.held.shape_of(part)
            count = torch.Size(shape).numel()
            found.append(Held(part.worker, part.start, part.stop, shape, count * size))
        return found

    def __repr__(self) -> str:
        return in_words(str(self.held), self.held.axis, self._parts_shown())

    def _repr_html_(self) -> str:
        return drawn(f"ShardedTensor({self.held})", self.held.axis, self._parts_shown())

    def __getitem__(self, index: Any) -> ShardedTensor:
        return ShardedTensor(indexed(self.held, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "a sharded tensor cannot be written to: use what gives a new one (torch.where, x * y), "
            "or write inside a tg.pmap"
        )

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a tensor without dimensions")
        return self.shape[0]

    def __iter__(self) -> Iterator[ShardedTensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        if self.numel() != 1:
            raise RuntimeError(
                f"whether a sharded tensor of {self.numel()} elements is true is ambiguous: use "
                ".all() or .any()"
            )
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a sharded tensor is on workers: x.gather().numpy() brings it here")
