"""Run layers of a shard, or one function, and leave a tape."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from taskgrad.errors import LayerError, TravelError
from taskgrad.graph import pack
from taskgrad.graph.calls import LOSS, CallSpec
from taskgrad.graph.functions import Template
from taskgrad.graph.pytree import Structure, describe, flatten
from taskgrad.graph.segments import Segment
from taskgrad.worker import training
from taskgrad.worker.activation_checkpoint import recomputed
from taskgrad.worker.communicator import Communicator
from taskgrad.worker.deferred_norm import deferred
from taskgrad.worker.devices import do_results_stay, staged, to_device
from taskgrad.worker.failures import forward_error
from taskgrad.worker.mailbox import GroupAborted
from taskgrad.worker.parameter_writes import refused
from taskgrad.worker.randomness import may_draw, random_stream
from taskgrad.worker.segment_run import SegmentRun
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.shard_lock import exclusive
from taskgrad.worker.split_backward import WeightUses, splitting
from taskgrad.worker.stage_modules import Members
from taskgrad.worker.store import Store, buffers_key
from taskgrad.worker.sync_norm import synchronized
from taskgrad.worker.tape import Tape
from taskgrad.worker_names import WorkerName


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
                members = None if shard is None else shard.stage(call.steps).members()
                return self._give_all(members, tape.outputs, tape.output_structure)
            context = call.context
            if shard is not None and context is not None:
                training.begin(shard, context.draw.step)
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
        context = call.context
        arguments = Template.of(call.template)
        takes, structures, fed = self._feed(values, arguments, shard.device if shard else None)
        edges = _edges(takes, fed) if call.segment and self.taped else None
        uses = WeightUses() if self.taped and context is not None and context.split else None
        if shard is None:
            output = self._call(store, None, arguments, fed)
        else:
            shard.set_mode(call.mode)
            if context is None:
                output = self._call(store, shard, arguments, fed)
            else:
                with refused(shard, call.steps, store.worker), self._watched(shard, uses):
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
            raise forward_error(error, store.worker, name, kind, (fed, {}), call.draw) from error
        members = None if shard is None else shard.stage(call.steps).members()
        if self.taped:
            parameters = {} if members is None else members.trainable()
            _refuse_unknown(parameters, shard, store.worker)
            tape = Tape(
                call.title,
                takes,
                structures,
                leaves,
                structure,
                parameters,
                shard,
                comm,
                recomputes=context is not None and bool(context.recompute),
                uses=uses,
                edges=edges,
            )
            store.put(call.key, tape)
        return self._give_all(members, leaves, structure)

    @contextlib.contextmanager
    def _watched(self, shard: ResidentShard, uses: WeightUses | None) -> Iterator[None]:
        """Record the statistics of batch norms if they are deferred, and uses of weights."""
        norms = shard.training.norms if shard.training is not None else None
        if uses is None and norms is None:
            yield
            return
        steps, draw = self.call.steps, self.call.draw
        members = shard.stage(steps).members()
        with contextlib.ExitStack() as regions:
            if norms is not None and draw is not None:
                index, name, _ = steps[0]
                given = self.call.segment
                first = Segment.of(given).first if given else index, name
                regions.enter_context(deferred(members.modules, norms, draw.microbatch, first))
            if uses is not None:
                weights = members.trainable().values()
                regions.enter_context(splitting(uses, members.modules, weights))
            yield

    def _feed(
        self, values: tuple[Any, ...], arguments: Template, device: torch.device | None
    ) -> tuple[list[list[torch.Tensor | None]], list[Structure], list[Any]]:
        """For each slot the leaves that take gradients, the structure, and the layer's argument."""
        takes, structures, fed = [], [], []
        parameters, raw = arguments.parameters, self.call.raw
        for slot, (value, wanted) in enumerate(zip(values, self.call.needs_grad, strict=True)):
            leaves, structure = flatten(value)
            own = {0} if slot in parameters else structure.parameters
            if raw:
                taken = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
                given = leaves
            else:
                taken, given = _feed(leaves, self.taped and wanted, device, own)
            takes.append(taken)
            structures.append(structure)
            fed.append(structure.build(given))
        return takes, structures, fed

    def _give_all(self, members: Members | None, leaves: list[Any], structure: Structure) -> Any:
        stays = self.call.draw is not None and do_results_stay()
        given = [_give(leaf, members, stays) for leaf in leaves]
        if structure.parameters and self.taped:
            ours = members.trainable().values() if members is not None else ()
            for i in structure.parameters:
                if not _is_new(leaves[i], ours):
                    given[i] = nn.Parameter(given[i], requires_grad=False)
        return structure.build(given)

    def _call(
        self, store: Store, shard: ResidentShard | None, arguments: Template, fed: list[Any]
    ) -> Any:
        steps, context = self.call.steps, self.call.context
        if self.call.segment and shard is not None:
            segment = SegmentRun(self.call, store.worker, shard, fed)
            value = segment.output(context.recompute if context is not None and self.taped else ())
            return self._steps(store, shard, fed, segment.count, len(steps), value)  # the loss
        args, kwargs = arguments.fill(fed)
        if context is None or not context.recompute or not self.taped:
            return self._steps(store, shard, fed, 0, len(steps), *args, **kwargs)
        segments = dict(context.recompute)
        at = 0
        while at < len(steps):
            stop = segments.get(at, at + 1)
            run = functools.partial(self._steps, store, shard, fed, at, stop)
            if at in segments:
                layers = shard.stage(steps[at:stop]).layers if shard is not None else []
                value = recomputed(run, layers, *args, **kwargs)
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
        rank, context = call.rank, call.context
        for position in range(start, stop):
            index, name, kind = call.steps[position]
            if index == LOSS and shard is not None:
                fn = shard.loss
            elif shard is None or call.function:
                tensors = [fed[i] for i in call.tensor_slots]
                fn = pack.unpack(call.function, tensors, own=False)
                if shard is not None and isinstance(fn, nn.Module) and call.mode is not None:
                    fn.train(call.mode)
            else:
                fn = shard.layers[index]
            loss = context.loss if index == LOSS and context is not None else None
            if loss is not None:
                args = (*args, *Template.of(loss.template).fill(fed))
            try:
                with contextlib.ExitStack() as regions:
                    if context is not None and may_draw(fn):
                        regions.enter_context(random_stream(*context.draw, name))
                    elif context is None and rank is not None:
                        stream = rank.group.seed, 0, rank.index, "rank"
                        regions.enter_context(random_stream(*stream))
                    if context is not None and index != LOSS:
                        regions.enter_context(synchronized(fn, name, position))
                    value = fn(*args, **kwargs)
                if loss is not None:
                    counts = loss.weight is None or fed[loss.weight] != 0
                    _check_loss(value, loss.check_finite, counts)
            except GroupAborted:
                raise
            except BaseException as error:
                given = (args, kwargs)
                raise forward_error(error, store.worker, name, kind, given, call.draw) from error
            args, kwargs = (value,), {}
        return args[0]


def _check_loss(value: Any, finite: bool, counts: bool) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise TypeError(
            f"a loss is one floating-point number, a tensor; this one gave {describe(value)}"
        )
    if not counts:  # nothing is made of it
        return
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
        start: torch.Tensor = staged(leaf.detach(), device)
        moved = start
        takes = wanted and (leaf.is_floating_point() or leaf.is_complex())
        if takes and i in parameters:
            start = moved = nn.Parameter(start.to(device, copy=True))
        else:
            if takes:
                start.requires_grad_()
            if device is not None and device != start.device:
                moved = to_device(start, device)
            if moved is start:
                moved = start.clone()
        taken.append(start if takes else None)
        given.append(moved)
    return taken, given


def _edges(takes: list[list[torch.Tensor | None]], fed: list[Any]) -> dict[int, GradientEdge]:
    """Of each slot that is one tensor with a gradient: where steps take it from."""
    return {
        slot: get_gradient_edge(fed[slot])
        for slot, leaves in enumerate(takes)
        if len(leaves) == 1 and leaves[0] is not None and isinstance(fed[slot], torch.Tensor)
    }


def _is_new(leaf: torch.Tensor, ours: Collection[nn.Parameter]) -> bool:
    """True if a layer made or trained this Parameter, which is not one of the shard's."""
    if not leaf.is_leaf or any(leaf is parameter for parameter in ours):
        return False
    return leaf._version > 0 or not leaf.requires_grad


def _give(leaf: Any, members: Members | None, stays: bool) -> Any:
    """An output leaf as a result: no autograd graph, no memory that a later step writes.

    It is in the host's memory unless it stays on its device.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.detach()
    if not (leaf.is_cpu or leaf.is_meta or stays):
        return leaf.cpu()
    if members is not None and leaf.layout is torch.strided and members.hold(leaf):
        return leaf.clone()
    return leaf


def _refuse_unknown(
    parameters: dict[str, nn.Parameter], shard: ResidentShard | None, worker: WorkerName
) -> None:
    """Raise for parameters that were frozen when the chain was made: their gradients are lost."""
    if shard is not None and not shard.trainable.issuperset(parameters):
        late = [name for name in parameters if name not in shard.trainable]
        raise LayerError(
            f"parameter {late[0]!r} on worker {worker} was frozen when the chain was made and "
            "requires grad now: a layer set that in its forward. Set it before the chain is made",
            late[0],
            worker.address,
            None,
        )
