"""Addresses: scratch memory, and errors for tensors whose memory a kernel cannot read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from taskgrad.kernels.codegen.access import CACHE_LINE


def aligned_buffer(size: int) -> tuple[torch.Tensor, int]:
    """A tensor with this many bytes from a cache line on, and the address of that line."""
    buffer = torch.empty(size + CACHE_LINE, dtype=torch.uint8)
    return buffer, -(-buffer.data_ptr() // CACHE_LINE) * CACHE_LINE


def unreadable(name: str, tensors: Iterable[torch.Tensor]) -> RuntimeError:
    """The error for a call with these tensors, one of which has no readable memory."""
    what = next(filter(None, map(_description, tensors)), "a tensor without memory of its own")
    return RuntimeError(f"{name} got {what}")


def _description(x: torch.Tensor) -> str:
    if x.is_nested:
        return "a nested tensor: use its parts (x.unbind()) or x.to_padded_tensor(0.0)"
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout}: use x.to_dense()"
    if x.is_meta:
        return "a tensor on meta, which has no values"
    if torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x):
        return (
            "a tensor without memory of its own, as is_grads_batched=True makes them: "
            "use torch.func.vmap, jacrev or jacfwd"
        )
    try:
        if x.data_ptr() or not x.numel():
            return ""
    except RuntimeError:
        return f"a {type(x).__name__} without memory of its own"
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__} without memory of its own"
    if x._is_zerotensor():
        return "a tensor of zeros that has no memory: use x.clone()"
    return "a tensor whose memory was freed (its storage was resized)"
