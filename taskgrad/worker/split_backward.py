"""The backward in two parts: cotangents of a stage's inputs first, gradients of its weights later.

The later part fills what would be a pipeline's bubble, as in zero-bubble schedules (Qi et al.,
2023). While a stage runs forward, linear layers, convolutions and embeddings get an autograd graph
of their own, which the stage's graph goes through as one node. The backward for inputs asks that
graph for the gradient of its input and records the cotangent; the backward for weights asks it for
the rest. So both run the kernels that autograd chooses, on the same tensors, to the same bits.

Some gradients of weights are computed with the inputs' cotangents nevertheless: of weights that
other functions use as well, which come in parts that autograd sums; of what is not a parameter
itself but made of some (parametrizations); and in layers that are compiled, or that run again in
the backward (activation checkpointing).

Under autocast a weight that two such layers and another function use may differ in the last bit:
autograd sums the parts that went through one cast before it casts them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from taskgrad.graph.cotangents import Gradient

_SPLIT = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.embedding,
    }
)
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
# The same function without its own look at modes, so that they see the linear layers within.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class WeightUse(NamedTuple):
    """One use of weights in a forward: the end of its own graph, and the cotangent that came."""

    output: GradientEdge
    parameters: tuple[nn.Parameter, ...]
    cotangent: torch.Tensor


@dataclass
class WeightUses:
    """The uses of weights that a cotangent has come to, newest first.

    `elsewhere` are the ids of parameters that other functions use, too: autograd sums all parts of
    their gradients. Uses are recorded while `recording`, in the backward for inputs.
    """

    recorded: list[WeightUse] = field(default_factory=list)
    elsewhere: set[int] = field(default_factory=set)
    recording: bool = False

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the uses that a backward comes to in the block."""
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def parameters(self) -> set[nn.Parameter]:
        """The parameters that have recorded uses."""
        return {p for use in self.recorded for p in use.parameters}

    def gradients(
        self, parameters: Iterable[nn.Parameter], *, retain: bool
    ) -> dict[nn.Parameter, Gradient]:
        """The gradients of these parameters from all recorded uses.

        Without `retain` the graphs of all uses end with that.
        """
        wanted = set(parameters)
        uses = [use for use in self.recorded if not wanted.isdisjoint(use.parameters)]
        takers = list(dict.fromkeys(p for u in uses for p in u.parameters if p in wanted))
        found: Sequence[Gradient] = ()
        if uses:
            found = _gradients(
                tuple([use.output for use in uses]),
                tuple(takers),
                tuple([use.cotangent for use in uses]),
                retain=retain,
            )
        if not retain:
            self.recorded.clear()
        return dict(zip(takers, found, strict=True))


def splitting(
    uses: WeightUses | None, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]
) -> AbstractContextManager[Any]:
    """A block in which operations that use these parameters get graphs of their own.

    `modules` are all that run in it, the inner ones too.
    """
    if uses is None or any(m._compiled_call_impl or "_orig_mod" in m._modules for m in modules):
        return contextlib.nullcontext()
    return _Splitting(uses, parameters)


class _Splitting(TorchFunctionMode):
    def __init__(self, uses: WeightUses, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._uses = uses
        self._parameters = {id(p) for p in parameters}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and _PLAIN.issuperset(types):
            with self:
                return _attention(*args, **kwargs)
        if func in _SPLIT and torch.is_grad_enabled() and not _is_transformed():
            x, weight, bias = _operands(func, args, kwargs)
            if self._is_split(x, weight, bias, kwargs):
                weights = (weight,) if bias is None or not bias.requires_grad else (weight, bias)
                return _run(func, x, weights, args, kwargs, self._uses)
        result = func(*args, **kwargs)
        for given in (args, kwargs.values()) if kwargs else (args,):
            for value in given:
                for part in value if isinstance(value, tuple | list) else (value,):
                    if id(part) in self._parameters and _takes_gradient(result):
                        self._uses.elsewhere.add(id(part))
        return result

    def _is_split(self, x: Any, weight: Any, bias: Any, kwargs: dict[str, Any]) -> bool:
        return (
            type(x) is torch.Tensor
            and id(weight) in self._parameters
            and weight.requires_grad
            and (bias is None or id(bias) in self._parameters or not bias.requires_grad)
            and not (x.is_leaf and x.requires_grad)
            and not kwargs.get("sparse")
        )


def _is_transformed() -> bool:
    """True under ``torch.compile``, ``torch.func``, or hooks on saved tensors.

    Activation checkpointing sets such hooks; what is recomputed must save what was saved before.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _operands(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Input, weight and bias."""
    x = args[0] if args else kwargs.get("input")
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    if func is F.embedding:
        return x, weight, None
    return x, weight, args[2] if len(args) > 2 else kwargs.get("bias")


def _takes_gradient(result: Any) -> bool:
    results = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(r, torch.Tensor) and r.requires_grad for r in results)


class _Graph(NamedTuple):
    """The graph of one operation, from its input to its output, and how to make it once more."""

    output: GradientEdge
    input: torch.Tensor
    weights: tuple[nn.Parameter, ...]
    uses: WeightUses
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _run(
    func: Callable[..., Any],
    x: torch.Tensor,
    weights: tuple[nn.Parameter, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    uses: WeightUses,
) -> torch.Tensor:
    """Run the operation in a graph of its own; the output is that of one node, `_Split`."""
    kind = x.device.type
    if x.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))  # or the graph would keep it in float32
    inner = x.detach().requires_grad_(x.requires_grad)
    args, kwargs = args[1:], {name: v for name, v in kwargs.items() if name != "input"}
    output = func(inner, *args, **kwargs) if args else func(input=inner, **kwargs)
    edge = GradientEdge(output.grad_fn, output.output_nr)
    graph = _Graph(edge, inner, weights, uses, func, args, kwargs)
    result: torch.Tensor = _Split.apply([output], graph, x, *weights)
    return result


class _Split(torch.autograd.Function):
    """An operation as one node of its stage's graph."""

    @staticmethod
    def forward(
        ctx: Any, output: list[torch.Tensor], graph: _Graph, x: torch.Tensor, *weights: nn.Parameter
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.graph = graph
        return output.pop().detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        graph: _Graph = ctx.graph
        uses, weights = graph.uses, graph.weights
        if not uses.recording:
            [x] = ctx.saved_tensors
            return None, None, *_differentiate(graph, x, grad, ctx.needs_input_grad[2:])
        ctx.graph = None
        needed = [graph.input.requires_grad, *(id(w) in uses.elsewhere for w in weights)]
        later = tuple(w for w, now in zip(weights, needed[1:], strict=True) if not now)
        if later:
            uses.recorded.append(WeightUse(graph.output, later, grad))
        found: Sequence[Gradient] = ()
        if inputs := _where((graph.input, *weights), needed):
            found = _gradients((graph.output,), inputs, (grad,), retain=bool(later))
        return None, None, *_spread(found, needed)


def _gradients(
    outputs: tuple[GradientEdge, ...],
    inputs: tuple[torch.Tensor, ...],
    cotangents: tuple[torch.Tensor, ...],
    *,
    retain: bool,
) -> Sequence[Gradient]:
    """As ``torch.autograd.grad``, which takes longer to look at its arguments than small layers."""
    return _engine_run_backward(
        outputs, cotangents, retain, False, inputs, allow_unreachable=False, accumulate_grad=False
    )


def _differentiate(
    graph: _Graph, x: torch.Tensor, grad: torch.Tensor, needed: Sequence[bool]
) -> Iterator[Gradient]:
    """All gradients, differentiable: a layer asks for them in its own forward."""
    graph.uses.elsewhere.update(map(id, graph.weights))
    func, args, kwargs = graph.func, graph.args, graph.kwargs
    with torch.enable_grad():
        output = func(x, *args, **kwargs) if args else func(input=x, **kwargs)
    inputs = _where((x, *graph.weights), needed)
    found = torch.autograd.grad(output, inputs, grad, create_graph=torch.is_grad_enabled())
    return _spread(found, needed)


def _where(values: Sequence[torch.Tensor], needed: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    return tuple([value for value, need in zip(values, needed, strict=True) if need])


def _spread(found: Sequence[Gradient], needed: Sequence[bool]) -> Iterator[Gradient]:
    """The gradients found, None where none was needed."""
    rest = iter(found)
    return (next(rest) if need else None for need in needed)
