"""Batch norm over the microbatches that replicas take at once, as torch's SyncBatchNorm.

The calls of a stage for these microbatches are the ranks of a process group. In the forward they
exchange count, mean and sum of squared deviations of what each is to normalize, in the backward the
sums of the cotangent and of its product with what was normalized. Both are combined in rank order
in float64, so that all ranks have the same bits. Activation checkpointing, which runs layers again,
does not exchange again: a rank keeps the moments of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from taskgrad.worker.communicator import Communicator, running
from taskgrad.worker.deferred_norm import Moments, in_forwards

_inside: ContextVar[bool] = ContextVar("taskgrad_synchronized", default=False)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PARAMETERS = (
    *("input", "running_mean", "running_var", "weight", "bias"),
    *("training", "momentum", "eps"),
)
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


@contextmanager
def synchronized(fn: Any, name: str, step: int) -> Iterator[None]:
    """Have batch norms in a layer normalize over all ranks in the block, if this thread runs one.

    `step` is the layer's place among the steps of the call. The second time that this is run, in
    the backward, what was exchanged the first time is used.
    """
    comm = running()
    if comm is None or not isinstance(fn, nn.Module):
        yield
        return
    norms = {n: m for n, m in fn.named_modules() if isinstance(m, NORMS)}
    if not norms:
        yield
        return
    again = step in comm.recorded
    run = _Run(comm, comm.recorded.setdefault(step, []), again)
    with ExitStack() as regions:
        regions.callback(_inside.reset, _inside.set(True))
        for inner, norm in norms.items():
            title = f"{name}.{inner}" if inner else name
            regions.enter_context(in_forwards(norm, partial(_Synchronized, norm, title, run)))
        yield


@contextmanager
def none_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Raise RuntimeError if one of these normalizes in the block, a backward, by itself.

    It does if a layer runs parts of it again there, which is not known here.
    """

    def check(norm: nn.Module, _: Any) -> None:
        if norm.training and not _inside.get():
            raise RuntimeError(
                "a batch norm that is synchronized runs again in the backward, in a layer that "
                "calls torch.utils.checkpoint: it would normalize by its own microbatch alone. "
                "Use the trainer's option checkpoint= instead"
            )

    with ExitStack() as regions:
        for norm in modules:
            if isinstance(norm, NORMS):
                regions.callback(norm.register_forward_pre_hook(check).remove)
        yield


class _Run:
    """One run of a layer: the moments of its normalizations, made or found in their order."""

    def __init__(self, comm: Communicator, recorded: list[Moments], again: bool) -> None:
        self.comm = comm
        self._recorded = recorded
        self._again = iter(recorded) if again else None

    def moments(self, x: torch.Tensor, what: str) -> Moments:
        """Those of what all ranks normalize."""
        if self._again is not None:
            return next(self._again)
        own = _moments(x)
        count = torch.tensor([own.count], dtype=torch.float64, device="cpu")
        payload = [count, own.mean, own.squares]
        messages = self.comm.exchange(what, False, [payload] * self.comm.size)
        every = [
            Moments(int(count), mean, squares)
            for count, mean, squares in (m.payload for m in messages)
        ]
        self._recorded.append(reduce(Moments.__add__, every))
        return self._recorded[-1]

    def normalize(
        self, x: torch.Tensor, weight: Any, bias: Any, total: Moments, eps: float, what: str
    ) -> torch.Tensor:
        """The normalized input. Its backward, an exchange, comes in the order of the forward's."""
        comm = self.comm
        token = comm.start if self._again is not None else comm.token
        token, y = _Normalize.apply(token, x, weight, bias, comm, total, eps, what)
        if self._again is None and token.requires_grad:
            comm.token = token
        return y


class _Synchronized(TorchFunctionMode):
    """Normalizes over all ranks what a batch norm in training normalizes."""

    def __init__(self, norm: _BatchNorm, name: str, run: _Run) -> None:
        super().__init__()
        self._norm = norm
        self._name = name
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        given = {**_DEFAULTS, **dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        if not (given["training"] and self._norm.training):
            return func(*args, **kwargs)
        x = given["input"]
        if not x.numel():
            raise ValueError("a synchronized batch norm takes microbatches that are not empty")
        what = f"batch norm {self._name!r} of {x.shape[1]} channels"
        total = self._run.moments(x.detach(), what)
        running = given["running_mean"], given["running_var"]
        _move(running, total, given["momentum"])
        return self._run.normalize(x, given["weight"], given["bias"], total, given["eps"], what)


def _moments(x: torch.Tensor) -> Moments:
    mean, variance = torch.ops.aten.batch_norm_update_stats(_wide(x), None, None, 0.0)
    count = x.numel() // x.shape[1]
    return Moments(count, mean.double().cpu(), variance.double().cpu() * count)


def _move(running: tuple[Any, Any], total: Moments, momentum: float) -> None:
    """Move running statistics; as torch's own kernel, without counting a version."""
    unbiased = total.squares / max(1, total.count - 1)
    for buffer, value in zip(running, (total.mean, unbiased), strict=True):
        if buffer is not None:
            buffer.data.copy_(buffer.double().lerp(value.to(buffer.device), momentum))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of its statistics: float64, or float32 for all others."""
    return x if x.dtype is torch.float64 else x.float()


class _Normalize(torch.autograd.Function):
    """Normalizes by the moments of all ranks; it takes and returns a token, as collectives do."""

    @staticmethod
    def forward(
        ctx: Any,
        token: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        comm: Communicator,
        total: Moments,
        eps: float,
        what: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = _wide(x)
        mean = total.mean.to(given)
        variance = (total.squares / total.count).to(given)
        scale, shift = (None if t is None else t.to(given) for t in (weight, bias))
        y = F.batch_norm(given, mean, variance, scale, shift, False, 0.0, eps).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.about = comm, total.count, eps, what, bias is not None
        return token.clone(), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: torch.Tensor, dy: torch.Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        comm, count, eps, what, has_bias = ctx.about
        given, dy = _wide(x), _wide(dy)
        scale = None if weight is None else weight.to(given)
        # With the statistics as constants; what they give to the gradient is added below.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, given, scale, mean, variance, None, None, False, eps, [True, True, True]
        )
        own = torch.stack([dbias, dweight]).double().cpu()
        messages = comm.exchange(f"the backward of {what}", False, [[own]] * comm.size)
        sums = reduce(torch.add, (m.payload[0] for m in messages)) / count
        inverse = (variance.double() + eps).rsqrt()
        factor = inverse if scale is None else inverse * scale
        by_channel = (1, -1, *(1 for _ in x.shape[2:]))
        mean_dy, mean_product = (
            (factor * t).to(given).view(by_channel)
            for t in (sums[0].to(x.device), sums[1].to(x.device) * inverse)
        )
        dx -= mean_dy + (given - mean.view(by_channel)) * mean_product
        return (
            token,
            dx.to(x.dtype),
            None if weight is None else dweight.to(weight.dtype),
            dbias.to(weight.dtype if weight is not None else x.dtype) if has_bias else None,
            *(None,) * 4,
        )
