"""Driver, worker: a tensor as its metadata and its memory, which is not copied.

Dask's own way with a tensor goes through numpy, which has no bfloat16 and no float8. Here a tensor
becomes an out-of-band buffer of pickle protocol 5, the bytes of its memory, with dtype, shape and
strides. `reduce_tensor` does that for the picklers of `taskgrad.cluster.wire.serialize`; plain
``pickle`` is unaffected.

What arrives:

- Values, bit for bit, with the same dtype, shape and type. Strides too, where the tensor fills its
  memory in some order of its dimensions (channels_last, transposes) or repeats it (`expand`): then
  only distinct elements are sent. Other values are packed first, in the tensor's own order.
- A leaf as a leaf with its ``requires_grad`` and its ``grad``. A tensor *inside* an autograd graph
  cannot take its graph along: its value arrives, with ``requires_grad`` off. (Dask's own family
  makes a new leaf of it, whose gradients are silently lost.)
- Each tensor with memory of its own: two views of one storage arrive as two tensors. One tensor
  object that a value holds twice (tied weights) arrives as one.
- A tensor from an accelerator goes through host memory to the receiver's device of that type, the
  one that layers were put on last; where there is none, it stays on the host. Not tested with
  several kinds of device. Channels between workers may do better (`Put`).
- A tensor in pinned memory in ordinary memory: other processes cannot be sure to read what a device
  driver has mapped.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch

from taskgrad.cluster.wire import thresholds
from taskgrad.graph.sparse import components
from taskgrad.worker.devices import home

# Of a buffer's address: vector instructions are slow across cache lines.
_ALIGNMENT = 16

_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OWN_REDUCES = (torch.Tensor.__reduce_ex__, torch.nn.Parameter.__reduce_ex__)


Put = Callable[[torch.Tensor], Any]
"""Takes a tensor that is on a device, with its elements in one dimension, and returns what is
pickled in their place; None if they are to be sent from the host."""


def reduce_tensor(t: torch.Tensor, put: Put | None = None) -> Any:
    """A tensor as pickle's (function, arguments); NotImplemented: as torch itself pickles it.

    `put` may take what is on a device: then it is not copied to the host.

    torch pickles tensors without memory of their own (meta, wrapper subclasses, nested: their parts
    come back here), quantized ones, and subclasses that define how they are pickled.
    """
    cls = type(t)
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        return _reduce(t, cls, put)
    if (
        cls.__reduce_ex__ not in _OWN_REDUCES
        or cls.__reduce__ is not torch.Tensor.__reduce__
        or cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or not isinstance(t.__getstate__(), dict | None)
    ):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return _reduce(t, cls, put)


def is_ready_to_send(value: Any) -> bool:
    """True for a contiguous CPU tensor or a few of them, which are serialized without a copy."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        ready = value.layout is torch.strided and value.device.type == "cpu"
        return ready and value.is_contiguous() and not (value.__dict__ or is_pinned(value))
    if kind is tuple or kind is list:
        return len(value) <= thresholds.INSPECTED_VALUES_MAX and all(map(is_ready_to_send, value))
    return value is None


def is_pinned(t: torch.Tensor) -> bool:
    """True for a tensor in pinned memory. Without CUDA in this process there is none to ask for."""
    return torch.cuda.is_initialized() and t.is_pinned()


def _reduce(t: torch.Tensor, cls: type, put: Put | None) -> Any:
    if t.layout is torch.strided:
        if t.device.type == "meta" or t.is_quantized or t.is_nested:
            return NotImplemented
        bare: Any = _reduce_dense(t, put)
    elif t.layout is torch.sparse_coo:
        bare = _build_coo, (*components(t), t.shape, t.is_coalesced())
    elif t.layout in _COMPRESSED:
        bare = _build_compressed, (t.layout, *components(t), t.shape)
    else:
        return NotImplemented
    leaf = t.is_leaf
    grad = t.grad if leaf else None
    state = t.__dict__ or None
    requires_grad = leaf and t.requires_grad
    if cls is torch.Tensor and not requires_grad and grad is None and state is None:
        return bare
    return _restore, (*bare, cls, requires_grad, grad, state)


def _restore(
    build: Any,
    arguments: tuple[Any, ...],
    cls: type,
    requires_grad: bool,
    grad: torch.Tensor | None,
    state: dict[str, Any] | None,
) -> torch.Tensor:
    """The tensor of these values, with its type, gradient and attributes."""
    bare = build(*arguments)
    t: torch.Tensor
    if cls is torch.nn.Parameter:
        t = torch.nn.Parameter(bare, requires_grad)
    else:
        t = (bare if cls is torch.Tensor else bare.as_subclass(cls)).requires_grad_(requires_grad)
    if state:
        t.__dict__.update(state)
    if grad is not None:
        t.grad = grad
    return t


def _reduce_dense(t: torch.Tensor, put: Put | None) -> tuple[Any, tuple[Any, ...]]:
    conj, neg, device = t.is_conj(), t.is_neg(), t.device.type
    physical = t.detach()
    if conj:
        physical = physical.conj()  # removes the conj bit: no copy
    if neg:
        physical = torch._neg_view(physical)
    flat, strides = _flatten(physical)
    flat = flat.view(torch.uint8)  # in which each dtype can be copied
    shape = tuple(t.shape)
    placed = put(flat) if put is not None and flat.numel() else None
    if placed is not None:
        return _build_placed, (placed, t.dtype, shape, strides, conj, neg)
    if device != "cpu":
        flat = flat.cpu()  # only now: a copy of what is expanded, or a view, would be packed
    elif is_pinned(flat):
        flat = flat.clone()
    if not flat.numel():
        return _build_empty, (t.dtype, shape, strides, device)
    buffer = pickle.PickleBuffer(flat.numpy().data)
    # Dask reads the first buffer of a message together with the header before it, so the tensor
    # would stay at an unaligned address. An empty buffer goes first.
    large = flat.nbytes >= thresholds.OWN_FRAME_MIN
    first = pickle.PickleBuffer(bytearray()) if large else None
    return _build_dense, (first, buffer, t.dtype, shape, strides, conj, neg, device)


def _flatten(t: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The distinct elements as one dimension, a view if possible, and the strides over them."""
    shape, strides = t.shape, t.stride()
    if t.is_contiguous():
        return t.as_strided((t.numel(),), (1,), t.storage_offset()), strides
    moving = [d for d in range(len(shape)) if shape[d] > 1 and strides[d] > 0]
    order = sorted(moving, key=lambda d: strides[d], reverse=True)
    packed = list(strides)
    count = 1
    for d in reversed(order):
        packed[d] = count
        count *= shape[d]
    if all(packed[d] == strides[d] for d in moving):
        return t.as_strided((count,), (1,), t.storage_offset()), strides
    if t.itemsize in _BITS:
        t = t.view(_BITS[t.itemsize])  # some dtypes have no copy of their own
    rows = t.as_strided([shape[d] for d in order], [strides[d] for d in order], t.storage_offset())
    return rows.contiguous().view(-1), tuple(packed)


def _build_dense(
    _first: Any,
    buffer: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    conj: bool,
    neg: bool,
    device: str,
) -> torch.Tensor:
    with memoryview(buffer) as view:
        flat: torch.Tensor
        if view.readonly:
            flat = torch.frombuffer(bytearray(view), dtype=torch.uint8)
        else:
            flat = torch.frombuffer(buffer, dtype=torch.uint8)
            if flat.data_ptr() % _ALIGNMENT:
                flat = flat.clone()
    if device != "cpu":
        flat = _to_device(flat, device)  # before it has its strides, which a copy may lose
    return _shaped(flat.view(dtype), shape, strides, conj, neg)


def _build_placed(
    placed: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    conj: bool,
    neg: bool,
) -> torch.Tensor:
    return _shaped(placed.view(dtype), shape, strides, conj, neg)


def _shaped(
    flat: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], conj: bool, neg: bool
) -> torch.Tensor:
    t = flat.as_strided(shape, strides)
    if neg:
        t = torch._neg_view(t)
    return t.conj() if conj else t


def _build_empty(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], device: str
) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    if device != "cpu":
        flat = _to_device(flat, device)
    return flat.view(dtype).as_strided(shape, strides)


def _to_device(t: torch.Tensor, device: str) -> torch.Tensor:
    """Move to this process's device of that type; stays on the host where it has none."""
    module = getattr(torch, device, None)
    return t.to(home(device)) if module is not None and module.is_available() else t


def _build_coo(
    indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...], coalesced: bool
) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        indices,
        values,
        shape,
        device=values.device,  # and not the default device
        check_invariants=False,
        is_coalesced=coalesced,
    )


def _build_compressed(
    layout: torch.layout,
    compressed: torch.Tensor,
    plain: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, ...],
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is in beta
        return torch.sparse_compressed_tensor(
            *(compressed, plain, values, shape),
            layout=layout,
            device=values.device,
            check_invariants=False,
        )
