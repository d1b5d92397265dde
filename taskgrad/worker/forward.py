"""Run layers of a shard, or one function, and leave a tape."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from taskgrad.errors import LayerError, TravelError
from taskgrad.graph import pack
from taskgrad.graph.calls import LOSS, CallSpec
from taskgrad.graph.functions import Template
from taskgrad.graph.pytree import Structure, carries_gradient, describe, flatten
from taskgrad.worker import training
from taskgrad.worker.activation_checkpoint import recomputed
from taskgrad.worker.communicator import Communicator
from taskgrad.worker.deferred_norm import deferred
from taskgrad.worker.failures import forward_error
from taskgrad.worker.mailbox import GroupAborted
from taskgrad.worker.randomness import may_draw, random_stream
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.shard_lock import exclusive
from taskgrad.worker.split_backward import WeightUses, splitting
from taskgrad.worker.store import Store, buffers_key
from taskgrad.worker.tape import Tape


@dataclass(frozen=True)
class Forward:
    """Run a call.

    It leaves a tape if `taped`; with `give_buffers` the new values of its function's buffers, for
    `ReadBuffers`.
    """

    call: CallSpec
    taped: bool
    give_buffers: bool

    @property
    def title(self) -> str:
        """The title of the call, for messages."""
        return self.call.title

    def run(self, store: Store, *values: Any) -> Any:
        """The output, detached; the tape, if any, is in the store under the call's key.

        If that tape exists already, the output is its output. Running the layers again might give
        another one (dropout), which the tape would not fit.
        """
        call = self.call
        shard = store.shard(call.shard) if call.shard is not None else None
        with exclusive(shard):
            tape = store.get(call.key)
            if tape is not None:
                return self._give_all(shard, tape.outputs, tape.output_structure)
            if shard is not None and call.draw is not None:
                training.begin(shard, call.draw.step)
            if call.rank is None:
                return self._run(store, shard, values)
            comm = Communicator(call.rank, store.mailboxes)
            with comm.active(call.key, call.peers):
                return self._run(store, shard, values, comm)

    def _run(
        self,
        store: Store,
        shard: ResidentShard | None,
        values: tuple[Any, ...],
        comm: Communicator | None = None,
    ) -> Any:
        call = self.call
        arguments = Template.of(call.template)
        takes, structures, fed = self._feed(values, arguments, shard.device if shard else None)
        if shard is not None:
            _set_mode(shard, call.mode)
        uses = WeightUses() if self.taped and call.context and call.context.split else None
        with contextlib.ExitStack() as regions:
            norms = shard.training.norms if shard and shard.training else None
            if norms is not None and call.draw is not None:
                modules = _modules(shard, call.steps)
                microbatch, (first, *_) = call.draw.microbatch, call.steps[0]
                regions.enter_context(deferred(modules, norms, microbatch, first))
            if uses is not None:
                weights = _trainable(shard, call.steps).values()
                regions.enter_context(splitting(uses, _modules(shard, call.steps), weights))
            output = self._call(store, shard, arguments, fed)
        if self.give_buffers:
            # By value: batch norm writes its statistics without counting a version.
            changed = [
                None if torch.equal(fed[i], values[i].to(fed[i].device)) else fed[i]
                for i in call.buffers
            ]
            store.put(buffers_key(call.key), changed)
        try:
            leaves, structure = flatten(output)
        except TravelError as error:
            _, name, kind = call.steps[-1]
            raise forward_error(error, store.address, name, kind, (fed, {}), call.draw) from error
        if self.taped:
            parameters = _trainable(shard, call.steps)
            _refuse_unknown(parameters, shard, store.address)
            tape = Tape(
                call.title,
                takes,
                structures,
                leaves,
                structure,
                parameters,
                shard,
                comm,
                recomputes=bool(call.context and call.context.recompute),
                uses=uses,
            )
            store.put(call.key, tape)
        return self._give_all(shard, leaves, structure)

    def _feed(
        self, values: tuple[Any, ...], arguments: Template, device: torch.device | None
    ) -> tuple[list[list[torch.Tensor | None]], list[Structure], list[Any]]:
        """For each slot the leaves that take gradients, the structure, and the layer's argument."""
        takes, structures, fed = [], [], []
        for slot, (value, wanted) in enumerate(zip(values, self.call.needs_grad, strict=True)):
            leaves, structure = flatten(value)
            own = {0} if slot in arguments.parameters else structure.parameters
            if self.call.raw:
                taken = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
                given = leaves
            else:
                taken, given = _feed(leaves, self.taped and wanted, device, own)
            takes.append(taken)
            structures.append(structure)
            fed.append(structure.build(given))
        return takes, structures, fed

    def _give_all(
        self, shard: ResidentShard | None, leaves: list[Any], structure: Structure
    ) -> Any:
        owned = _storages(shard, self.call.steps) if shard else set()
        given = [_give(leaf, owned) for leaf in leaves]
        ours = _trainable(shard, self.call.steps).values() if structure.parameters else ()
        for i in structure.parameters:
            if self.taped and not _is_new(leaves[i], ours):
                given[i] = nn.Parameter(given[i], requires_grad=False)
        return structure.build(given)

    def _call(
        self, store: Store, shard: ResidentShard | None, arguments: Template, fed: list[Any]
    ) -> Any:
        args, kwargs = arguments.fill(fed)
        steps, context = self.call.steps, self.call.context
        segments = dict(context.recompute) if context is not None and self.taped else {}
        at = 0
        while at < len(steps):
            stop = segments.get(at, at + 1)
            run = functools.partial(self._steps, store, shard, fed, at, stop)
            if at in segments:
                modules = _modules(shard, steps[at:stop])
                value = recomputed(run, modules, *args, **kwargs)
            else:
                value = run(*args, **kwargs)
            args, kwargs, at = (value,), {}, stop
        return args[0]

    def _steps(
        self,
        store: Store,
        shard: ResidentShard | None,
        fed: list[Any],
        start: int,
        stop: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the steps from `start` to `stop`, each on the result of the one before."""
        call = self.call
        for index, name, kind in call.steps[start:stop]:
            fn = self._function(shard, index, fed)
            loss = call.context.loss if index == LOSS and call.context is not None else None
            if loss is not None:
                args = (*args, *Template.of(loss.template).fill(fed))
            try:
                with self._stream(fn, name):
                    value = fn(*args, **kwargs)
                if loss is not None:
                    _check_loss(value, loss.check_finite)
            except GroupAborted:
                raise
            except BaseException as error:
                given = (args, kwargs)
                raise forward_error(error, store.address, name, kind, given, call.draw) from error
            args, kwargs = (value,), {}
        return args[0]

    def _function(self, shard: ResidentShard | None, index: int, fed: list[Any]) -> Any:
        if shard is None:
            tensors = [fed[i] for i in self.call.tensor_slots]
            return pack.unpack(self.call.function, tensors, own=False)
        return shard.loss if index == LOSS else shard.layers[index]

    def _stream(self, fn: Any, name: str) -> contextlib.AbstractContextManager[None]:
        rank, draw = self.call.rank, self.call.draw
        if rank is not None:
            return random_stream(rank.group.seed, 0, rank.index, "rank")
        if draw is None or not may_draw(fn):
            return contextlib.nullcontext()
        return random_stream(*draw, name)


def _check_loss(value: Any, finite: bool) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise TypeError(
            f"a loss is one floating-point number, a tensor; this one gave {describe(value)}"
        )
    if not value.requires_grad or value.grad_fn is None:
        raise TypeError(
            "the loss does not depend on what is trained, so that nothing would be: it is a "
            "constant, or was detached (.detach(), .item(), torch.no_grad()). A microbatch that "
            "has nothing to learn from gives (output * 0).sum()"
        )
    if finite and not math.isfinite(value.item()):
        raise FloatingPointError(f"the loss is {value.item()}")


def _feed(
    leaves: list[Any], wanted: bool, device: torch.device | None, parameters: Collection[int]
) -> tuple[list[torch.Tensor | None], list[Any]]:
    """For each leaf: the autograd leaf that takes its gradient, if any, and the layer's argument.

    The argument is a copy. A received tensor is Dask's memory, which other tasks read and the
    network may still be sending: an in-place layer must not write there. The Parameters of an
    object are leaves themselves: it may train them.
    """
    taken: list[torch.Tensor | None] = []
    given: list[Any] = []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            taken.append(None)
            given.append(leaf.copy() if type(leaf) is np.ndarray else leaf)
            continue
        start: torch.Tensor = leaf.detach()
        moved: torch.Tensor
        takes = wanted and carries_gradient(leaf)
        if takes and i in parameters:
            start = moved = nn.Parameter(start.to(device, copy=True))
        else:
            start.requires_grad_(takes)
            moved = start if device is None else start.to(device)
            moved = moved.clone() if moved is start else moved
        taken.append(start if takes else None)
        given.append(moved)
    return taken, given


def _is_new(leaf: torch.Tensor, ours: Collection[nn.Parameter]) -> bool:
    """True if a layer made or trained this Parameter, which is not one of the shard's."""
    if not leaf.is_leaf or any(leaf is parameter for parameter in ours):
        return False
    return leaf._version > 0 or not leaf.requires_grad


def _give(leaf: Any, owned: set[int]) -> Any:
    """An output leaf as a task's result: no autograd graph, no memory that a later step writes."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.detach()
    if leaf.device.type not in ("cpu", "meta"):
        return leaf.cpu()
    if owned and leaf.layout is torch.strided and leaf.untyped_storage().data_ptr() in owned:
        return leaf.clone()
    return leaf


def _modules(
    shard: ResidentShard | None, steps: tuple[tuple[int, str, str], ...]
) -> list[nn.Module]:
    if shard is None:
        return []
    layers = [shard.layers[index] for index, _, _ in steps if index != LOSS]
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def _storages(shard: ResidentShard, steps: tuple[tuple[int, str, str], ...]) -> set[int]:
    found = set()
    for module in _modules(shard, steps):
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.layout is torch.strided:
                found.add(tensor.untyped_storage().data_ptr())
    return found - {0}


def _trainable(
    shard: ResidentShard | None, steps: tuple[tuple[int, str, str], ...]
) -> dict[str, nn.Parameter]:
    if shard is None:
        return {}
    used = {id(p) for module in _modules(shard, steps) for p in module.parameters()}
    return {n: p for n, p in shard.parameters.items() if id(p) in used and p.requires_grad}


def _refuse_unknown(
    parameters: dict[str, nn.Parameter], shard: ResidentShard | None, address: str
) -> None:
    """Raise for parameters that were frozen when the chain was made: their gradients are lost."""
    late = [name for name in parameters if shard is not None and name not in shard.trainable]
    if late:
        raise LayerError(
            f"parameter {late[0]!r} on worker {address} was frozen when the chain was made and "
            "requires grad now: a layer set that in its forward. Set it before the chain is made",
            late[0],
            address,
            None,
        )


def _set_mode(shard: ResidentShard, mode: bool | None) -> None:
    """Put the whole shard in training or evaluation mode, if it is not yet in it."""
    if mode is None or mode is shard.layer_mode:
        return
    for layer in shard.modules.values():
        layer.train(mode)
    shard.layer_mode = mode
