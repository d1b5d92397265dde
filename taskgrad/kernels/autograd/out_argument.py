"""`out=`: results written into existing tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from taskgrad.kernels.autograd.operation import Weak
from taskgrad.kernels.autograd.transforms import differentiates
from taskgrad.kernels.codegen.loop_nest import broadcast
from taskgrad.kernels.ir.dtypes import torch_dtype
from taskgrad.kernels.runtime.launch import Launcher
from taskgrad.kernels.runtime.memory import unreadable

_CACHED = 4_096


class OutArgument:
    """Runs a launcher with ``out=``.

    Shapes, strides and dtypes alone determine if a tensor fits; the answer is cached by these.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        # True if the kernel may write there itself, False if the result has to be copied.
        self._direct: dict[Any, bool] = {}

    def __call__(
        self, out: torch.Tensor, tensors: Sequence[torch.Tensor], weak: Weak | None
    ) -> torch.Tensor:
        """Fill `out` with the result, and return it.

        RuntimeError if it would need gradients; TypeError or ValueError if the result does not fit.
        """
        _check_tensor(self._launcher.name, out)
        if out.layout is not torch.strided or out.is_nested or not out.is_cpu:
            raise TypeError(
                f"{self._launcher.name}: out= must be a dense tensor of the CPU; got one of layout "
                f"{out.layout} on {out.device}"
            )
        if differentiates([*tensors, out]):
            raise _no_gradients(self._launcher.name)
        for t in tensors:
            if t.layout is not torch.strided or t.is_nested:
                raise unreadable(self._launcher.name, [t])
        given = [(t.dtype, t.shape) for t in tensors]
        key = out.dtype, out.shape, out.stride(), weak, torch.get_default_dtype(), *given
        direct = self._direct.get(key)
        if direct is None:
            direct = self._fits(out, tensors, weak)
            if len(self._direct) >= _CACHED:
                self._direct.clear()
            self._direct[key] = direct
        try:
            direct = direct and not out.is_neg() and not _overlaps(out, tensors)
        except RuntimeError as error:
            raise unreadable(self._launcher.name, tensors) from error
        if direct:
            if not out.is_inference():
                increment_version(out)  # autograd may have saved it
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
        (name,) = self._launcher.dtypes_for(tensors, weak or (False,) * len(tensors))
        _check_fit(out, shape, torch_dtype(name))
        return out.dtype == torch_dtype(name) and _is_injective(out)


def copy_to_out(name: str, result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy a result of torch's own dispatch into ``out=``."""
    _check_tensor(name, out)
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise _no_gradients(name)
    _check_fit(out, tuple(result.shape), result.dtype)
    if out.device != result.device:
        raise ValueError(f"{name}: out= is on {out.device}; the result is on {result.device}")
    return out.copy_(result)


def _check_tensor(name: str, out: Any) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{name}: out= must be a tensor; got {type(out).__name__}")


def _no_gradients(name: str) -> RuntimeError:
    return RuntimeError(f"{name}: out= has no gradients; call it without, or in torch.no_grad()")


def _check_fit(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(f"out= has the shape {tuple(out.shape)}; the result's is {shape}")
    if not torch.can_cast(dtype, out.dtype):
        raise TypeError(f"out= is {out.dtype}, which a result of {dtype} does not fit in")


def _overlaps(out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    """True if `out` shares memory with an input and is not exactly that input."""
    begin, end = _span(out)
    for t in tensors:
        first = t.data_ptr()
        if first < end and _span(t)[1] > begin:
            same = first, t.shape, t.stride(), t.dtype
            if same != (begin, out.shape, out.stride(), out.dtype):
                return True
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses at which its memory begins and ends."""
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not size:
            return 0, 0
        last += (size - 1) * stride
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _is_injective(out: torch.Tensor) -> bool:
    """True if no two elements share memory, as far as strides tell easily."""
    reached = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size != 1:
            if stride <= reached:
                return False
            reached += stride * (size - 1)
    return True
