"""`out=`: a result that is written where the caller says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from taskgrad.kernels.autograd.operation import Weak, differentiates
from taskgrad.kernels.codegen.loop_nest import broadcast
from taskgrad.kernels.ir.dtypes import torch_dtype
from taskgrad.kernels.runtime.launch import Launcher
from taskgrad.kernels.runtime.memory import unreadable

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
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"{self._launcher.name}: out= must be a tensor; got {type(out).__name__}"
            )
        if out.layout is not torch.strided or out.is_nested or not out.is_cpu:
            raise TypeError(
                f"{self._launcher.name}: out= must be a dense tensor of the CPU; got one of layout "
                f"{out.layout} on {out.device}"
            )
        if differentiates([*tensors, out]):
            raise RuntimeError(
                f"{self._launcher.name}: out= has no gradients; call it without, or in "
                "torch.no_grad()"
            )
        for t in tensors:
            if t.layout is not torch.strided or t.is_nested:
                raise unreadable(self._launcher.name, [t])
        given = [(t.dtype, t.shape) for t in tensors]
        key = out.dtype, out.shape, out.stride(), weak, torch.get_default_dtype(), *given
        direct = self._direct.get(key)
        if direct is None:
            direct = self._fits(out, tensors, weak)
            if len(self._direct) >= _KNOWN:
                self._direct.clear()
            self._direct[key] = direct
        try:
            direct = direct and not out.is_neg() and not _crosses(out, tensors)
        except RuntimeError as error:
            raise unreadable(self._launcher.name, tensors) from error
        if direct:
            if not out.is_inference():
                increment_version(out)  # autograd may have kept it
            elif not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{self._launcher.name}: out= was made in torch.inference_mode(), and can be "
                    "written only there"
                )
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
    begin, end = _span(out)
    for t in tensors:
        first = t.data_ptr()
        if first < end and _span(t)[1] > begin:
            same = first, t.shape, t.stride(), t.dtype
            if same != (begin, out.shape, out.stride(), out.dtype):
                return True
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its memory begins and ends."""
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not size:
            return 0, 0
        last += (size - 1) * stride
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _one_place_each(out: torch.Tensor) -> bool:
    """Whether each element surely has memory of its own."""
    reached = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size != 1:
            if stride <= reached:
                return False
            reached += stride * (size - 1)
    return True
