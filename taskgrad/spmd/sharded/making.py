"""Make sharded tensors of the driver's tensors and of Dask's collections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dask.base import is_dask_collection
from dask.delayed import Delayed
from distributed import Future

from taskgrad.arguments import shown
from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.registry import executor_of
from taskgrad.graph.leaves import External, Leaf
from taskgrad.graph.pytree import describe
from taskgrad.spmd.sharded.layout import Parts, Span, along, axis_of, chosen, spans_over
from taskgrad.spmd.sharded.running import call, described, kept, view
from taskgrad.worker import tensor_parts
from taskgrad.worker_names import WorkerName


def of_tensor(tensor: Any, axis: Any, workers: Any, owner: Session) -> Parts:
    """A tensor of the driver's, cut along an axis or with None copied, on these workers."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"shard takes a tensor; got {shown(tensor)}. torch.as_tensor makes one of an array or "
            "a number"
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"shard takes a dense tensor with values; got {describe(tensor)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TaskgradError(
            "shard of a tensor that takes a gradient: sharded tensors carry none to the driver. "
            "Give it .detach(), and take gradients inside a tg.pmap (torch.func.grad)"
        )
    axis = axis_of(axis, tensor.ndim, describe(tensor))
    spans = spans_over(chosen(workers, owner), tensor.shape, axis)
    tensor = tensor.detach().cpu()
    whole = Leaf(tensor, needs_grad=False)
    calls = []
    for span in spans:
        piece = whole
        if axis is not None:
            piece = Leaf(tensor[along(axis, span.start, span.stop)], needs_grad=False)
        calls.append(call(tensor_parts.copy, span, [piece], title="shard"))
    parts = kept(owner, spans, calls)
    return Parts(owner, tensor.shape, tensor.dtype, axis, tuple(parts))


def of_dask_array(array: Any, axis: Any, workers: Any, owner: Session) -> Parts:
    """A Dask array, whose chunks go straight to the workers of the parts."""
    if not is_dask_collection(array) or not hasattr(array, "chunks"):
        raise TypeError(f"from_dask takes a dask.array.Array; got {shown(array)}")
    shape: tuple[int, ...] = tuple(array.shape)
    if any(n != n for n in shape):
        raise ValueError(
            "the array has chunks of unknown sizes: call array.compute_chunk_sizes() first"
        )
    cut = axis_of(axis, len(shape), f"an array of shape {list(shape)}")
    spans = spans_over(chosen(workers, owner), shape, cut)
    calls = []
    for span in spans:
        part = array if cut is None else array[along(cut, span.start, span.stop)]
        one = (part.rechunk(-1) if part.ndim else part).to_delayed().item()
        calls.append(call(tensor_parts.of_array, span, [External(one)], title="from_dask"))
    parts, found = described(owner, spans, calls)
    return Parts(owner, torch.Size(shape), found[0].dtype, cut, tuple(parts))


def of_delayed(given: Any, axis: Any, workers: Any, owner: Session) -> Parts:
    """Dask's delayed arrays, tensors or partitions of a dataframe, one after the other."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise TypeError(f"from_delayed takes a list of delayed values; got {shown(given)}")
    for one in given:
        if not isinstance(one, Delayed):
            raise TypeError(f"from_delayed takes dask.delayed values; got {shown(one)}")
    if axis is None:
        raise ValueError("from_delayed joins its values along an axis: give axis=0, or another one")
    there = chosen(workers, owner)[: len(given)]
    # Neighbours on one worker, as `pmap` places ranks.
    holders = [there[i * len(there) // len(given)] for i in range(len(given))]
    calls = [
        call(tensor_parts.of_array, Span(worker), [External(one)], title="from_delayed")
        for worker, one in zip(holders, given, strict=True)
    ]
    pieces, found = described(owner, [Span(worker) for worker in holders], calls)
    shapes = [info.shape for info in found]
    cut = axis_of(axis, len(shapes[0]), f"a value of shape {list(shapes[0])}")
    assert cut is not None
    rests = {(info.dtype, *info.shape[:cut], None, *info.shape[cut + 1 :]) for info in found}
    if len(rests) > 1:
        raise ValueError(
            f"from_delayed joins values along axis {cut}, which differ in dtype or in another "
            "dimension: " + ", ".join(f"{info.dtype} {list(info.shape)}" for info in found)
        )
    spans, joins = _joined(holders, [shape[cut] for shape in shapes])
    calls = [
        call(
            tensor_parts.join,
            span,
            [view(pieces[i]) for i in those],
            title="from_delayed",
            axis=cut,
        )
        for span, those in zip(spans, joins, strict=True)
    ]
    parts = kept(owner, spans, calls)
    size = sum(shape[cut] for shape in shapes)
    shape = torch.Size([*shapes[0][:cut], size, *shapes[0][cut + 1 :]])
    return Parts(owner, shape, found[0].dtype, cut, tuple(parts))


def _joined(
    holders: Sequence[WorkerName], sizes: Sequence[int]
) -> tuple[list[Span], list[list[int]]]:
    """The part of each worker, and the pieces that it is of."""
    spans: list[Span] = []
    joins: list[list[int]] = []
    stop = 0
    for i, (worker, size) in enumerate(zip(holders, sizes, strict=True)):
        start, stop = stop, stop + size
        if spans and spans[-1].worker == worker:
            spans[-1] = Span(worker, spans[-1].start, stop)
            joins[-1].append(i)
        else:
            spans.append(Span(worker, start, stop))
            joins.append([i])
    full = [i for i, span in enumerate(spans) if span.length] or [0]
    return [spans[i] for i in full], [joins[i] for i in full]


def to_dask_array(x: Parts) -> Any:
    """A Dask array whose chunks are the parts, on their workers.

    Raises TypeError for a dtype that NumPy does not have.
    """
    import dask.array as da  # which imports much

    dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
    parts = x.parts if x.axis is not None else x.parts[:1]
    calls = [
        call(tensor_parts.to_array, part, [view(part)], title="to_dask", stays=False)
        for part in parts
    ]
    executor_of(x.session).run(calls)
    blocks = [
        da.from_delayed(Future(made.key, x.session.client), x.shape_of(part), dtype=dtype)
        for part, made in zip(parts, calls, strict=True)
    ]
    return blocks[0] if len(blocks) == 1 else da.concatenate(blocks, axis=x.axis)
