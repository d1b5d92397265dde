"""Tensors on Dask's wire: every dense dtype, as the bits that they are.

Dask's own family goes through numpy, which knows no bfloat16 and no float8: such a tensor raises on
the worker that receives it. Here a dense tensor is one frame of bytes, without a copy, plus its
dtype and strides. Importing this module registers the family, in every process that does.
"""

from __future__ import annotations

from typing import Any

# First: Dask registers its own family lazily, on the first tensor, over ours.
import distributed.protocol.torch as _stock
import numpy as np
import torch
from distributed.protocol.serialize import dask_deserialize, dask_serialize

_stock_serialize = _stock.serialize_torch_Tensor
_stock_deserialize = _stock.deserialize_torch_Tensor


def _dense_order(t: torch.Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest, if the tensor fills its memory; else None."""
    order = sorted(range(t.dim()), key=lambda d: (-t.stride()[d], d))
    expected = 1
    for d in reversed(order):
        if t.size(d) != 1:
            if t.stride(d) != expected:
                return None
            expected *= t.size(d)
    return order


@dask_serialize.register(torch.Tensor)
def serialize_tensor(t: torch.Tensor) -> tuple[dict[str, Any], list[Any]]:
    """Header and one frame; a detached tensor arrives as one, a leaf as a leaf."""
    if t.layout is not torch.strided or t.is_quantized or t.device.type == "meta":
        header, frames = _stock_serialize(t)
        return {**header, "stock": True}, frames
    # Contiguous along its own order of dimensions: a view of the bytes, in the order of memory.
    dense = t.detach().resolve_conj().resolve_neg().cpu()
    order = _dense_order(dense)
    if order is None:
        dense, order = dense.contiguous(), list(range(t.dim()))
    flat = dense.permute(order).reshape(-1)
    frame = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    header = {
        "dtype": str(t.dtype).removeprefix("torch."),
        "shape": tuple(t.shape),
        "order": order,
        "requires_grad": t.requires_grad,
    }
    return header, [frame]


@dask_deserialize.register(torch.Tensor)
def deserialize_tensor(header: dict[str, Any], frames: list[Any]) -> torch.Tensor:
    """Undo `serialize_tensor`; the tensor's memory is the frame's where that can be written."""
    if header.get("stock"):
        return _stock_deserialize(header, frames)
    dtype, shape, order = getattr(torch, header["dtype"]), header["shape"], header["order"]
    data = np.frombuffer(frames[0], dtype=np.uint8) if frames and len(frames[0]) else None
    if data is None:
        t = torch.empty(shape, dtype=dtype)
    else:
        if not data.flags.writeable:
            data = data.copy()
        flat = torch.from_numpy(data).view(dtype)
        permuted = flat.reshape([shape[d] for d in order])
        t = permuted.permute([order.index(d) for d in range(len(order))])
    return t.requires_grad_(header["requires_grad"])
