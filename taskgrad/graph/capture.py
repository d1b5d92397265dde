"""Capture the graph of a model: follow its forward once for each way in which it can go."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from taskgrad.graph.activation import Activation, CannotFollowError
from taskgrad.graph.followed_functions import functions_followed
from taskgrad.graph.following import Following
from taskgrad.graph.known_values import ForeignTensorError, KnownValues, Repeat
from taskgrad.graph.layer_graph import Captured, LayerGraph
from taskgrad.graph.layers import Layer, OwnTensors
from taskgrad.graph.pytree import flatten
from taskgrad.graph.stand_ins import Parts, fake_copy, follower, stand_in
from taskgrad.graph.torch_settings import settings_now

_MOST = 32  # graphs that are kept for calls of one structure
_MOST_STRUCTURES = 256
_MANY = 32  # times that a forward is followed without a word
logger = logging.getLogger("taskgrad")

Read = Callable[[Following, Activation], torch.Tensor]
Select = Callable[[Any], Any]
"""Takes what is needed of the model's output."""

_following_now = threading.RLock()  # torch.autograd.Function is changed meanwhile


@dataclass
class Entry:
    """A graph that was captured, and what repeats it: None if it cannot be repeated."""

    graph: LayerGraph
    repeat: Repeat | None


class Capture:
    """The graphs of one model, by the structure of its calls.

    Parameters
    ----------
    model
        The model, or a copy on the meta device; it is copied without its values.
    layers
        Its layers, in their order, by the names of which they are submodules.
    opened
        The names of the modules that are cut.
    title
        The model's name, for messages.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], opened: Sequence[str], title: str
    ) -> None:
        self.title = title
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = fake_copy(model, self._mode)
        self._opened = {name: self._model.get_submodule(name) for name in opened}
        self._parts = self._parts_of(layers)
        self._entries: OrderedDict[Hashable, list[Entry]] = OrderedDict()
        self._followed = 0

    def _parts_of(self, layers: Sequence[Layer]) -> Parts:
        modules: dict[int, tuple[int, str]] = {}
        hooks: dict[int, frozenset[int]] = {}
        tensors: dict[int, tuple[int, str, str, bool]] = {}
        for layer in layers:
            module = self._model.get_submodule(layer.name)
            own = OwnTensors(module) if layer.holds else module
            for name, parameter in own.named_parameters():
                full = f"{layer.name}.{name}" if layer.name else name
                tensors.setdefault(id(parameter), (layer.index, name, full, False))
            for name, buffer in own.named_buffers():
                full = f"{layer.name}.{name}" if layer.name else name
                tensors.setdefault(id(buffer), (layer.index, name, full, True))
            if not layer.holds:
                modules[id(module)] = layer.index, layer.name
                keys = (*module._forward_pre_hooks, *module._forward_hooks)
                hooks[id(module)] = frozenset(keys)
                stand_in(module, is_layer=True)
        opened = {id(module): name for name, module in self._opened.items() if name}
        for name, module in self._opened.items():
            if name:
                stand_in(module, is_layer=False)
        return Parts(modules, opened, tensors, hooks, self._mode)

    def find(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        mode: bool | None,
        read: Read,
        select: Select | None = None,
        stream: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Captured:
        """The graph of a call, and the values of its inputs.

        Parameters
        ----------
        mode
            True to train, False to evaluate, None for the mode that each part has.
        read
            Returns the value of an activation; raises if it cannot be had.
        select
            Takes what is needed of the output; equal objects for equal selections.
        stream
            A context in which random numbers are drawn.

        Raises what the model's forward does; CannotFollowError if it cannot be followed.
        """
        leaves, structure = flatten((tuple(args), dict(kwargs)))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = [_described(leaf) for leaf in leaves]
        # Structures are equal if their objects hold tensors in the same places: not all of them.
        objects = tuple(structure.skeletons)
        key: Hashable = structure, objects, tuple(others), mode, settings_now(), select
        try:
            entries = self._entries.setdefault(key, [])
            self._entries.move_to_end(key)
            if len(self._entries) > _MOST_STRUCTURES:
                self._entries.popitem(last=False)
        except TypeError:  # an argument that has no hash
            entries = []
        for entry in entries:
            if entry.repeat is None:
                continue
            with stream() if entry.repeat.draws else nullcontext():
                found = entry.repeat(inputs)
            if found is not None:
                return Captured(entry.graph, tuple(found))
        with stream():
            graph, given, repeat, _ = self.follow(args, kwargs, mode, read, select)
        self._followed += 1
        if self._followed == _MANY:
            logger.warning(
                "The forward of %s was followed %s times, which takes longer than its calls. "
                "It is when inputs have a shape that was not seen before, or the forward has a "
                "state: give batches fewer lengths (pad_to_multiple_of= of a tokenizer), or keep "
                "what has the state in one layer, with keep_together=.",
                self.title,
                _MANY,
            )
        entries[:] = [entry for entry in entries if entry.repeat is not None][: _MOST - 1]
        if repeat is not None:
            entries.insert(0, Entry(graph, repeat))
        return Captured(graph, tuple(given))

    def follow(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        mode: bool | None,
        read: Read,
        select: Select | None = None,
    ) -> tuple[LayerGraph, list[torch.Tensor], Repeat | None, Following]:
        """Follow one call; see `find`."""
        leaves, _ = flatten((tuple(args), dict(kwargs)))
        known = KnownValues([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        following = Following(self._parts, known, read)
        with _following_now, self._state_checked(known, mode):
            token = follower.set(following)
            try:
                with functions_followed(), known, following:
                    output = self._model(*args, **kwargs)
                    if select is not None:
                        output = select(output)
                graph, given = following.graph(output)
            except ForeignTensorError as error:
                raise following.from_inside(str(error)) from None
            finally:
                follower.reset(token)
        return graph, given, known.repeat(given), following

    @contextlib.contextmanager
    def _state_checked(self, known: KnownValues, mode: bool | None) -> Iterator[None]:
        """Set the mode in the block; note if the forward changes what it may read next time."""
        modes = {m: m.training for m in self._model.modules()}
        if mode is not None:
            for module in modes:
                module.training = mode
        before = self._state()
        drawn = random.getstate(), _numpy_state()
        buffers = {m: dict(m._buffers) for m in self._opened.values()}
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
        if before != self._state():
            known.repeatable = False
        if drawn != (random.getstate(), _numpy_state()):
            known.repeatable = False
        for name, module in self._opened.items():
            if module._buffers.keys() != buffers[module].keys() or any(
                module._buffers[key] is not buffer for key, buffer in buffers[module].items()
            ):
                module._buffers.clear()
                module._buffers.update(buffers[module])
                raise CannotFollowError("it assigns to a buffer of its own in forward()", name)

    def _state(self) -> list[Any]:
        return [
            {
                key: _signature(value)
                for key, value in vars(module).items()
                if key != "training" and not (key.startswith("_") and key in _MODULE_STATE)
            }
            for module in self._opened.values()
        ]


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1].tobytes(), state[2]


_VALUES = (
    *(str, bytes, int, float, complex, type(None), type(Ellipsis), type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_MODULE_STATE = frozenset(vars(nn.Module()))


def _described(leaf: Any) -> Hashable:
    """What a graph depends on of a leaf, besides the values of a tensor."""
    if isinstance(leaf, torch.Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else None
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad, type(leaf)
    if isinstance(leaf, _VALUES):
        return type(leaf), leaf
    try:  # by what is in it, which may change
        return type(leaf), cloudpickle.dumps(leaf)
    except Exception:  # equal to no other
        return object()


def _signature(value: Any, depth: int = 3) -> Any:
    """Equal for attributes between which a forward would see no difference, as far as is known."""
    if isinstance(value, torch.Tensor):
        own = isinstance(value, Activation)
        return "activation" if own else (id(value), tuple(value.shape), value._version)
    if isinstance(value, list | tuple | set | frozenset):
        if not depth or isinstance(value, set | frozenset):
            return type(value), len(value)
        return type(value), [_signature(part, depth - 1) for part in value]
    if isinstance(value, dict):
        if not depth:
            return type(value), len(value)
        return type(value), {key: _signature(part, depth - 1) for key, part in value.items()}
    if isinstance(value, str | bytes | int | float | complex | bool | type(None)):
        return value
    return id(value)


def refuse_reading(following: Following, activation: Activation) -> torch.Tensor:
    """For `Capture.find` where no value can be had."""
    raise following.cannot("its forward depends on the value of an activation")
