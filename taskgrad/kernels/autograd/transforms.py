"""What every operation needs to know of autograd and of the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

Tensors = Sequence[torch.Tensor]


def differentiates(tensors: Tensors) -> bool:
    """True if autograd has to record the call, or a transform of `torch.func` is active."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return False


def batched_first(tensors: Tensors, in_dims: Sequence[int | None]) -> list[torch.Tensor]:
    """Move batch dimensions to the front so that the tensors broadcast as unbatched ones did."""
    pairs = list(zip(tensors, in_dims, strict=True))
    rank = max(t.dim() - (d is not None) for t, d in pairs)
    moved = []
    for tensor, dim in pairs:
        if dim is not None:
            first = tensor.movedim(dim, 0)
            missing = (1,) * (rank - first.dim() + 1)
            tensor = first.reshape(first.shape[0], *missing, *first.shape[1:])
        moved.append(tensor)
    return moved
