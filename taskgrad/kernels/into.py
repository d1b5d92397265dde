"""`out=`: a result that is written where the caller says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.kernels.dtypes import torch_dtype
from taskgrad.kernels.launch import Launcher
from taskgrad.kernels.layout import broadcast
from taskgrad.kernels.operation import Weak, differentiates

_KNOWN = 4_096


class Into:
    """Writes results of an operation, by its launcher, into tensors that there are already.

    What fits depends on shapes, strides and dtypes alone, and is looked at once for each of them:
    a small call takes no longer than that.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        # Whether the kernel may write there itself, or a copy has to follow.
        self._direct: dict[Any, bool] = {}

    def __call__(
        self, out: torch.Tensor, tensors: Sequence[torch.Tensor], weak: Weak | None
    ) -> torch.Tensor:
        """`out`, with the result.

        Raises
        ------
        RuntimeError
            It would need gradients.
        TypeError, ValueError
            The result does not fit.
        """
        if differentiates([*tensors, out]):
            raise RuntimeError(
                f"{self._launcher.name}: out= has no gradients; call it without, or in "
                "torch.no_grad()"
            )
        given = [(t.dtype, t.shape) for t in tensors]
        key = out.dtype, out.shape, out.stride(), weak, torch.get_default_dtype(), *given
        direct = self._direct.get(key)
        if direct is None:
            direct = self._fits(out, tensors, weak)
            if len(self._direct) >= _KNOWN:
                self._direct.clear()
            self._direct[key] = direct
        if direct and out.is_cpu and not out.is_neg() and not _crosses(out, tensors):
            self._launcher.run(tensors, weak, out)
            return out
        return out.copy_(self._launcher.run(tensors, weak)[0])

    def _fits(self, out: torch.Tensor, tensors: Sequence[torch.Tensor], weak: Weak | None) -> bool:
        shape = broadcast([tuple(t.shape) for t in tensors])
        if tuple(out.shape) != shape:
            raise ValueError(f"out= has the shape {tuple(out.shape)}; the result's is {shape}")
        (name,) = self._launcher.dtypes_for(tensors, weak or (False,) * len(tensors))
        if not torch.can_cast(torch_dtype(name), out.dtype):
            raise TypeError(f"out= is {out.dtype}, which a result of torch.{name} does not fit in")
        return out.dtype == torch_dtype(name) and _one_place_each(out)


def _crosses(out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether it shares memory with one of them and is not one and the same piece of it."""
    place = out.untyped_storage().data_ptr()
    for t in tensors:
        if t.untyped_storage().data_ptr() == place:
            same = t.data_ptr(), t.shape, t.stride(), t.dtype
            if same != (out.data_ptr(), out.shape, out.stride(), out.dtype):
                return True
    return False


def _one_place_each(out: torch.Tensor) -> bool:
    return all(stride or size == 1 for size, stride in zip(out.shape, out.stride(), strict=True))
