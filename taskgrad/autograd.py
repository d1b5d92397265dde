"""The bridge to torch.autograd: collected values as part of the driver's own graph.

`attach` turns values that came from the workers into outputs of one autograd Function per connected
group of thunks. Its backward runs the remote backward; gradients of the driver's tensors go on
through the driver's graph. Gradients of the parameters on the workers are added there only if
autograd accumulates at all: ``torch.autograd.grad`` accumulates nothing, here as in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from taskgrad.errors import TapeError
from taskgrad.executors.backward import accumulations, run_backward
from taskgrad.executors.base import Executor
from taskgrad.graph.adjoint import Adjoint, adjoint, calls_behind
from taskgrad.graph.calls import Call
from taskgrad.graph.cotangents import Gradient, add
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pullback import ParameterGrad
from taskgrad.graph.pytree import carries_gradient, cotangents, flatten
from taskgrad.graph.shards import Shard

Differentiable = Callable[[Sequence[torch.Tensor], Sequence[Gradient]], Sequence[Gradient]]


class _Claim:
    """Claims the tapes of some calls for one autograd function, until it ends or is garbage."""

    _calls: Sequence[Call] = ()  # of one that an interrupt ended before it began

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        for call in self._calls:
            call.tape.claim()

    def end(self) -> None:
        for call in self._calls:
            call.tape.unclaim()
        self._calls = []

    def __del__(self) -> None:
        self.end()


class Recording:
    """A computation on workers or in threads that was recorded for its backward there."""

    differentiable: Differentiable | None = None
    """`backward` as a function of inputs and gradients of outputs, for ``create_graph=True``.

    If it is None torch raises the error of a function that can be differentiated once.
    """

    def backward(self, grads: Sequence[Gradient], retain: bool) -> Sequence[Gradient]:
        """Gradients of the inputs, given those of the outputs."""
        raise NotImplementedError


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recording: Recording, outputs: Sequence[torch.Tensor], *inputs: torch.Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.recording = recording
        ctx.save_for_backward(*inputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Gradient) -> Any:
        differentiable = ctx.recording.differentiable
        if torch.is_grad_enabled() and differentiable is not None:
            return None, None, *differentiable(ctx.saved_tensors, grads)
        return _backward_once(ctx, *grads)


@torch.autograd.function.once_differentiable
def _backward_once(ctx: Any, *grads: Gradient) -> Any:
    return None, None, *ctx.recording.backward(grads, _keeps_graph())


def record(
    recording: Recording, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The same outputs, as functions of these inputs in the driver's autograd graph."""
    found: tuple[torch.Tensor, ...] = _Recorded.apply(recording, outputs, *inputs)
    return found


class _Group(Recording):
    """Collected values that share calls, and what one backward through them needs."""

    def __init__(self, nodes: list[Node], values: list[Any], executor: Executor) -> None:
        self.nodes = nodes
        self.executor = executor
        self.flat = [flatten(value) for value in values]
        calls = calls_behind(nodes)
        self.claim = _Claim(calls)
        self.spent = False
        self.waiting: list[Adjoint] = []
        found = {id(i.value): i for c in calls for i in c.inputs if isinstance(i, Leaf)}
        found |= {id(n.value): n for n in nodes if isinstance(n, Leaf)}
        self.inputs = [n.value for n in found.values() if n.needs_grad]

    def take_tensors(self) -> list[torch.Tensor]:
        """The tensors to attach, once: keeping them here would be a cycle through the graph."""
        taken = []
        for leaves, _ in self.flat:
            for i, leaf in enumerate(leaves):
                if _is_attached(leaf):
                    taken.append(leaf)
                    leaves[i] = _TENSOR
        return taken

    def backward(self, grads: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Gradients of an anchor and of `inputs`."""
        self.waiting.clear()
        if self.spent:
            raise TapeError(
                "backward a second time through a collected value: its tapes were used by the "
                "first. Pass retain_graph=True to the first if you need two"
            )
        rest = iter(grads)
        seeds: list[tuple[Node, Node | None]] = []
        for node, (leaves, structure) in zip(self.nodes, self.flat, strict=True):
            given = [next(rest) if leaf is _TENSOR else None for leaf in leaves]
            # All ranks of a process group go back together, though one of them has no part in it.
            ranks = isinstance(node, Call) and node.spec.rank is not None
            if node.needs_grad and (ranks or any(g is not None for g in given)):
                seed = cotangents(given, structure)
                seeds.append((node, Leaf(seed, needs_grad=False, checked=True)))
        keep = frozenset(c for c in calls_behind(self.nodes) if c.tape.claims > 1)
        found = adjoint(seeds, retain=retain, keep=keep)
        by_tensor: dict[int, Any] = {}
        for leaf, grad in run_backward(found, self.executor, accumulate=False).items():
            if grad is not None:
                grad = grad.to(leaf.value.device)  # a worker's "cuda" is the first GPU here
                by_tensor[id(leaf.value)] = add(by_tensor.get(id(leaf.value)), grad)
        if not retain:
            self.spent = True
            self.claim.end()
        self.waiting.append(found)
        return [_anchor(), *(by_tensor.get(id(value)) for value in self.inputs)]

    def accumulate(self, anchor: torch.Tensor) -> None:
        """Autograd accumulates the anchor's gradient: so do those of the workers' parameters."""
        anchor.grad = None
        waiting, self.waiting = self.waiting, []
        _accumulate_after_backward(waiting, self.executor)


class _Accumulation:
    """The gradients that one backward on the driver gives to parameters on workers.

    It exists as long as that backward runs.
    """

    def __init__(self) -> None:
        self.found: dict[Executor, list[Adjoint]] = {}

    def accumulate(self) -> None:
        """Add them to the parameters' `.grad`. A parameter of several groups gets one sum."""
        for executor, found in self.found.items():
            parameters: dict[tuple[Shard, str], tuple[ParameterGrad, ...]] = {}
            for one in found:
                for key, parts in one.parameters.items():
                    parameters[key] = (*parameters.get(key, ()), *parts)
            executor.run(accumulations(Adjoint((), {}, parameters)))


_accumulations: WeakValueDictionary[int, _Accumulation] = WeakValueDictionary()


def _accumulate_after_backward(found: Sequence[Adjoint], executor: Executor) -> None:
    # The engine drops its callbacks, which hold the accumulation, when the backward ends or fails.
    task = torch._C._current_graph_task_id()
    accumulation = _accumulations.get(task)
    if accumulation is None:
        accumulation = _accumulations[task] = _Accumulation()
        torch.autograd.Variable._execution_engine.queue_callback(accumulation.accumulate)
    accumulation.found.setdefault(executor, []).extend(found)


def _is_attached(leaf: Any) -> bool:
    """True if a leaf becomes part of the graph: a Parameter that the call made does not."""
    return carries_gradient(leaf) and not (isinstance(leaf, nn.Parameter) and leaf.requires_grad)


_TENSOR = object()  # stands for a tensor that was handed to autograd


def _anchor() -> torch.Tensor:
    """A tensor whose dtype and device do not depend on torch's defaults, which may change."""
    return torch.zeros(0, dtype=torch.float32, device="cpu")


def _keeps_graph() -> bool:
    """True if the running backward has retain_graph=True.

    Torch has no public name for it; without this one tapes are kept until the graph goes.
    """
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(asked()) if asked is not None else True


def attach(nodes: Sequence[Node], values: Sequence[Any], executor: Executor) -> list[Any]:
    """The same values, their tensors attached to the driver's autograd graph where they can be."""
    attached = list(values)
    for members in _connected(nodes):
        group = _Group([nodes[i] for i in members], [values[i] for i in members], executor)
        if not any(_is_attached(leaf) for leaves, _ in group.flat for leaf in leaves):
            continue
        anchor = _anchor().requires_grad_()
        anchor.register_post_accumulate_grad_hook(group.accumulate)
        structures = list(group.flat)
        outputs = iter(record(group, group.take_tensors(), [anchor, *group.inputs]))
        for i, (leaves, structure) in zip(members, structures, strict=True):
            attached[i] = structure.build(
                [next(outputs) if leaf is _TENSOR else leaf for leaf in leaves]
            )
    return attached


def _connected(nodes: Sequence[Node]) -> list[list[int]]:
    """Indices of the nodes that take gradients, grouped by calls or process groups they share."""
    groups: list[tuple[set[int], list[int]]] = []
    for i, node in enumerate(nodes):
        if not isinstance(node, Call) or not node.needs_grad:
            continue
        calls = calls_behind([node])
        behind = {id(c) for c in calls} | {id(c.spec.rank.group) for c in calls if c.spec.rank}
        members = [i]
        for group in [g for g in groups if g[0] & behind]:
            groups.remove(group)
            behind |= group[0]
            members = group[1] + members
        groups.append((behind, members))
    return [sorted(members) for _, members in groups]
