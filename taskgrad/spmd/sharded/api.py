"""`shard` and `load_sharded`: put a tensor on workers, from the driver or from files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from distributed import Client

from taskgrad.cluster.session import WorkerSpec, session
from taskgrad.spmd.sharded import files, making
from taskgrad.spmd.sharded.tensor import ShardedTensor


def shard(
    tensor: torch.Tensor,
    axis: Any = 0,
    *,
    workers: Sequence[WorkerSpec] | None = None,
    client: Client | None = None,
) -> ShardedTensor:
    """Put a tensor on workers: cut along an axis, or a copy on each of them.

    Index i of the axis goes to the worker where `pmap`, mapping that axis, has rank i. So with
    ``in_axes=axis`` the result is read where it is; with the axis None, by ``in_axes=None``.

    Parameters
    ----------
    tensor
        It is copied.
    axis
        That along which it is cut: an int, or None for copies; or a `Sharded`.
    workers
        Indices, names or addresses; by default all. One for which there is nothing is left out.
    client
        By default the current one.

    Raises
    ------
    ValueError
        There is no such axis.
    PlacementError
        There is no such worker.
    TypeError
        `tensor` is no dense tensor with values.
    TaskgradError
        It takes a gradient, in grad mode.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> x = tg.shard(torch.tensor([1.0, 3.0]))
    >>> tg.pmap(lambda x: x + tg.psum(x, "i"), axis_name="i")(x)
    tensor([5., 7.])
    """
    return ShardedTensor(making.of_tensor(tensor, axis, workers, session(client)))


def load_sharded(
    folder: str | os.PathLike[str],
    *,
    workers: Sequence[WorkerSpec] | None = None,
    client: Client | None = None,
) -> ShardedTensor:
    """Read a sharded tensor that `ShardedTensor.save` wrote; each worker reads its part.

    It is cut along the axis along which it was, over the workers there are now.

    Parameters
    ----------
    folder
        On a filesystem that all workers share with the driver.
    workers, client
        As for `shard`.

    Raises
    ------
    CheckpointError
        There is no sharded tensor in the folder, it is damaged, or a worker does not see it.

    Examples
    --------
    >>> import tempfile, torch, taskgrad as tg
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tg.shard(torch.tensor([1.0, 3.0])).save(folder)
    ...     tg.load_sharded(folder).gather()
    tensor([1., 3.])
    """
    return ShardedTensor(files.load(folder, workers, session(client)))
