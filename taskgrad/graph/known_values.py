"""Record what a model's forward computes of its inputs alone, so that it can be repeated.

Masks, positions and the like are computed on the driver, for they decide how a forward goes on. For
another batch the recorded operations run again, and what the forward read of their values in Python
must be the same again: else the forward itself has to be followed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from taskgrad.graph.activation import Activation

_Identity = tuple[Any, ...]


def _identity(tensor: torch.Tensor) -> _Identity:
    """Equal for tensors that show the same elements of the same memory in the same way."""
    strided = tensor.layout is torch.strided
    return (
        tensor.untyped_storage()._cdata if strided else id(tensor),
        tensor.storage_offset() if strided else 0,
        tensor.shape,
        tensor.stride() if strided else None,
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


class ForeignTensorError(Exception):
    """A tensor that was made inside of a layer, which the message names, is used outside."""


class KnownValues(TorchDispatchMode):
    """Records operations on tensors that have values here, while it is active.

    Parameters
    ----------
    inputs
        The tensors that a call was given, in order.

    Attributes
    ----------
    repeatable : bool
        False if what was done cannot be repeated for other inputs.
    paused : bool
        True while operations are not to be recorded.
    foreign : dict
        Tensors that are not to be used, by their storage, each with where it was made.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.repeatable = not any(t.requires_grad for t in inputs)
        self.paused = False
        self._graph = fx.Graph()
        self._nodes: dict[_Identity, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # so that no identity is used again
        self._constants: dict[str, torch.Tensor] = {}
        self._given: set[int] = set()  # storages of inputs and constants
        self._fresh: set[int] = set()  # those of torch.tensor(...)
        self._guards: list[tuple[fx.Node, Callable[[Any], bool]]] = []
        self._draws = False
        self.foreign: dict[int | None, tuple[torch.Tensor, str]] = {}
        for i, tensor in enumerate(inputs):
            self._note(tensor, self._graph.placeholder(f"input_{i}"))
            self._given.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing in the block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if Activation in types:  # it says what is wrong
            return NotImplemented
        given, given_by_name = tree_map(self._node_of, (args, kwargs))
        if func._schema.is_mutable and self._writes_given(func, args, kwargs):
            self.repeatable = False
        result = func(*args, **kwargs)
        node = self._graph.call_function(func, given, given_by_name)
        tags = func.tags
        self._draws |= torch.Tag.nondeterministic_seeded in tags
        if torch.Tag.dynamic_output_shape in tags:
            shapes = _shapes(result)
            self._guards.append((node, lambda value: _shapes(value) == shapes))
        if isinstance(result, torch.Tensor):
            self._note(result, node)
            if func is torch.ops.aten.lift_fresh.default:
                self._fresh.add(result.untyped_storage()._cdata)
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    item = self._graph.call_function(_item, (node, i))
                    self._note(part, item)
        else:
            self._guards.append((node, lambda value: _same(value, result)))
        return result

    def read(self, tensor: torch.Tensor) -> None:
        """The values of a tensor were read in Python, all of them."""
        node = self._node_of(tensor)
        if not self.paused and isinstance(node, fx.Node):
            seen = tensor.detach().clone()
            self._guards.append((node, lambda value: torch.equal(value, seen)))

    def was_made(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was made since recording began, in memory of its own."""
        identity = _identity(tensor)
        storage = identity[0]
        return identity in self._nodes and (storage not in self._given or storage in self._fresh)

    def _note(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._alive.append(tensor)
        self._nodes[_identity(tensor)] = node

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        identity = _identity(value)
        if identity not in self._nodes:
            if identity[0] in self.foreign:
                raise ForeignTensorError(self.foreign[identity[0]][1])
            name = f"constant_{len(self._constants)}"
            self._constants[name] = value
            self._note(value, self._graph.get_attr(name))
            self._given.add(value.untyped_storage()._cdata)
        return self._nodes[identity]

    def _writes_given(self, func: Any, args: Any, kwargs: Any) -> bool:
        """True if the operation writes an input, or a tensor from before the call."""
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = (t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor))
                if any(t.untyped_storage()._cdata in self._given for t in tensors):
                    return True
        return False

    def repeat(self, wanted: Sequence[torch.Tensor]) -> Repeat | None:
        """What computes these tensors of other inputs again; None if that cannot be done."""
        if not self.repeatable:
            return None
        nodes = [self._node_of(t) for t in wanted]
        read = [node for node, _ in self._guards]
        self._graph.output((nodes, read))
        self._graph.eliminate_dead_code()
        root = torch.nn.Module()
        for name, tensor in self._constants.items():
            setattr(root, name, tensor)
        run = fx.GraphModule(root, self._graph).forward
        checks = [check for _, check in self._guards]
        return Repeat(run, checks, _shapes(list(wanted)), self._draws)


class Repeat:
    """Computes what a forward computed of its inputs, for other inputs.

    `draws` is True if random numbers are drawn for it.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        checks: list[Callable[[Any], bool]],
        shapes: list[Any],
        draws: bool,
    ) -> None:
        self._run = run
        self._checks = checks
        self._shapes = shapes
        self.draws = draws

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """The tensors; None if the forward would not do the same with these inputs."""
        state = torch.get_rng_state() if self.draws else None
        try:
            found, read = self._run(*inputs)
            same = all(check(value) for check, value in zip(self._checks, read, strict=True))
            if same and _shapes(found) == self._shapes:
                result: list[torch.Tensor] = found
                return result
        except Exception:  # the forward itself will say what is wrong
            pass
        if state is not None:
            torch.set_rng_state(state)
        return None


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _shapes(value: Any) -> list[Any]:
    return [t.shape if isinstance(t, torch.Tensor) else t for t in tree_flatten(value)[0]]


def _same(value: Any, seen: Any) -> bool:
    if isinstance(value, float) and isinstance(seen, float) and math.isnan(seen):
        return math.isnan(value)
    return type(value) is type(seen) and bool(value == seen)
