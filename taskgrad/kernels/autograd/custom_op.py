"""A custom operator of torch for all operations, opaque to `torch.compile`; a key tells which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.kernels.autograd.operation import operation_of
from taskgrad.kernels.autograd.transforms import batched_first
from taskgrad.kernels.codegen.loop_nest import strides_of_result
from taskgrad.kernels.ir.dtypes import torch_dtype


@torch.library.custom_op("taskgrad::elementwise", mutates_args=())
def elementwise(
    key: str, tensors: Sequence[torch.Tensor], weak: Sequence[bool]
) -> list[torch.Tensor]:
    """The outputs of the operation with this key."""
    return operation_of(key).launcher.run(tensors, tuple(weak))


@elementwise.register_fake
def _fake(key: str, tensors: Sequence[torch.Tensor], weak: Sequence[bool]) -> list[torch.Tensor]:
    shape, strides = strides_of_result([(tuple(t.shape), t.stride()) for t in tensors])
    names = operation_of(key).launcher.dtypes_for(tensors, weak)
    device = tensors[0].device
    return [
        torch.empty_strided(shape, strides, dtype=torch_dtype(name), device=device)
        for name in names
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.key, tensors, ctx.weak = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, cotangents: Sequence[torch.Tensor]) -> Any:
    tensors = ctx.saved_tensors
    wanted = [k for k, t in enumerate(tensors) if t.requires_grad or t.is_floating_point()]
    key = f"{ctx.key}.pullback({','.join(map(str, wanted))})"
    weak = [False] * len(cotangents) + list(ctx.weak)
    results = elementwise(key, [*[c.resolve_neg() for c in cotangents], *tensors], weak)
    found = {k: r.sum_to_size(tensors[k].shape) for k, r in zip(wanted, results, strict=True)}
    return None, [found.get(k) for k in range(len(tensors))], None


def _vmap(info: Any, in_dims: Any, key: str, tensors: Any, weak: Any) -> Any:
    outputs = elementwise(key, batched_first(tensors, in_dims[1]), weak)
    return outputs, [0] * len(outputs)


elementwise.register_autograd(_backward, setup_context=_setup_context)
elementwise.register_vmap(_vmap)
