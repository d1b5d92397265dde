"""Take cotangents back through a tape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from taskgrad.errors import CotangentError, LayerError
from taskgrad.graph.calls import Draw, Rank
from taskgrad.graph.cotangents import Gradient, add, add_each
from taskgrad.graph.parameter_extras import has_hooks
from taskgrad.graph.pytree import cotangents, describe
from taskgrad.worker.communicator import Communicator
from taskgrad.worker.devices import in_use, staged, to_device
from taskgrad.worker.failures import backward_error
from taskgrad.worker.gradients import accumulate_each, gradients, own, summed
from taskgrad.worker.hooks import hooks_off
from taskgrad.worker.mailbox import GroupAborted
from taskgrad.worker.shard_lock import exclusive
from taskgrad.worker.store import Store
from taskgrad.worker.sync_norm import none_alone
from taskgrad.worker.tape import Tape, WeightTape
from taskgrad.worker_names import WorkerName

Root = torch.Tensor | GradientEdge
"""Where cotangents enter autograd's graph."""


@dataclass(frozen=True)
class Backward:
    """One backward task; `key` is its own, `token` that of the forward whose tape it uses.

    `sources` says where each cotangent is: a position among the task's values, or None for ones.
    Those are multiplied by `factor`, and by the number at position `weight`; where that is 0 no
    gradient is taken, as 0 times it could be NaN. `positions` says which element of the output each
    cotangent is of, None for all of it, as all are without it. `carried` are further cotangents of
    inputs, (slot, position), to which this one adds its own. `wanted` are the input slots whose
    cotangents are returned. `includes` lists for parameters the sources of gradients of newer
    backwards (see `Store.parts`), to which this one adds its own. `accumulate` lists, for each
    parameter whose gradient is complete with this backward, the sources of the other parts before
    its own. `peers` are the keys of the backward tasks of all ranks, if the forward was one of a
    process group: its `rank`.
    """

    key: str
    token: str
    title: str
    sources: tuple[int | None, ...]
    wanted: tuple[int, ...]
    retain: bool
    draw: Draw | None = None
    factor: float = 1.0
    weight: int | None = None
    includes: dict[str, list[str | int]] = field(default_factory=dict)
    accumulate: dict[str, list[str | int]] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    positions: tuple[int | None, ...] = ()
    carried: tuple[tuple[int, int], ...] = ()
    rank: Rank | None = None

    def run(self, store: Store, *values: Any) -> Any:
        """Cotangents of the wanted slots (one, or a tuple); parameters' gradients are stored.

        The tape is used once the cotangents are known to fit.
        """
        tape = store.tape(self.token, keep=True)
        if tape.communicator is None:
            return self._run(store, tape, values)
        modules = tape.shard.all_modules.members().modules if tape.shard is not None else ()
        with tape.communicator.active(self.key, self.peers), none_alone(modules):
            return self._run(store, tape, values)

    def _run(self, store: Store, tape: Tape, values: tuple[Any, ...]) -> Any:
        with exclusive(tape.shard):
            seeds = self._sum(tape, store.worker, values)
            if not self.retain:
                store.tape(self.token, keep=False)
            slots = {i: tape.inputs[i] for i in self.wanted}
            roots = self._roots(store, tape, values)
            uses = tape.uses
            late: dict[str, nn.Parameter] = {}
            try:
                if uses is None:
                    with tape.lock, hooks_off(tape.parameters.values()):
                        found, parameters = _differentiate(tape, seeds, slots, roots, self.retain)
                else:
                    alone = self._alone(tape)
                    with tape.lock, hooks_off(tape.parameters.values()), uses.record():
                        found, parameters = _differentiate(tape, seeds, slots, roots, self.retain)
                        late = self._split(store, tape, parameters, alone)
                reached = uses is not None and bool(uses.recorded)
                seeded = None in self.sources and any(seed is not None for seed in seeds)
                if self.draw is not None and seeded and not reached:
                    _check_reached(self.draw, store.worker, found, parameters)
            except (LayerError, GroupAborted):
                raise
            except BaseException as error:
                raise backward_error(error, store.worker, self.title, self.draw) from error
            if tape.shard is not None:
                # What is complete is added to the shard's gradients; the rest is kept here.
                totals: dict[str, Gradient] = {}
                for name, sources in self.accumulate.items():
                    if name not in late:
                        total = parameters.pop(name, None)
                        if sources:
                            parts = [*store.parts(name, sources, values), total]
                            total = summed(tape.shard.parameters[name], parts, values)
                        totals[name] = total
                accumulate_each(tape.shard, totals, worker=store.worker, draw=self.draw)
        if parameters:
            store.put(self.key, parameters)
        given = [
            cotangents(found[i], tape.input_structures[i])
            if any(g is not None for g in found[i])
            else None
            for i in self.wanted
        ]
        return given[0] if len(given) == 1 else tuple(given)

    def _roots(
        self, store: Store, tape: Tape, values: tuple[Any, ...]
    ) -> list[tuple[Root, torch.Tensor]]:
        """What newer uses in other stages give of inputs and parameters, where it comes to here.

        Autograd adds to it one use after the other, as if these were uses in this stage.
        """
        if tape.edges is None or tape.shard is None:
            return []
        roots: list[tuple[Root, Any]] = [(tape.edges[s], values[i]) for s, i in self.carried]
        for name, sources in self.includes.items():
            parameter = tape.shard.parameters[name]
            roots += [(parameter, part) for part in store.parts(name, sources, values)]
        device = tape.shard.device
        return [(root, _on(device, part)) for root, part in roots if part is not None]

    def _alone(self, tape: Tape) -> dict[str, nn.Parameter]:
        """The parameters that only this call uses, and that have no hooks."""
        return {
            name: tape.parameters[name]
            for name, sources in self.accumulate.items()
            if not sources
            and name not in self.includes
            and name in tape.parameters
            and not has_hooks(tape.parameters[name])
        }

    def _split(
        self,
        store: Store,
        tape: Tape,
        grads: dict[str, Gradient],
        alone: dict[str, nn.Parameter],
    ) -> dict[str, nn.Parameter]:
        """Leave gradients of weights to `WeightBackward`; returns the parameters of these.

        They are some of those that are used by this call `alone`. Of the others `grads` has all.
        """
        uses, shard = tape.uses, tape.shard
        if uses is None or shard is None:
            return {}
        used, pending = uses.parameters(), store.pending(shard)
        late = {n: p for n, p in alone.items() if p in used or n in pending}
        now = {n: p for n, p in tape.parameters.items() if p in used and n not in late}
        if now:
            parts = uses.gradients(now.values(), retain=True)
            shared = [use.cotangent for use in uses.recorded]
            for name, part in own({n: parts[p] for n, p in now.items()}, shared).items():
                grads[name] = add(grads[name], part)
        found = {name: grads.pop(name) for name in late}
        store.put(self.token, WeightTape(shard, uses, late, found))
        return late

    def _sum(self, tape: Tape, worker: WorkerName, values: tuple[Any, ...]) -> list[Gradient]:
        """The cotangents of the output's leaves, those that meet summed in the order given."""
        total: list[Gradient] | None = None
        positions = self.positions or (None,) * len(self.sources)
        for source, position in zip(self.sources, positions, strict=True):
            if source is None:
                weight = self._weight(tape, values)
                part: list[Gradient] = [_seed(tape, worker, weight) if weight else None]
            elif position is None:
                part = tape.match(values[source], worker)
            else:
                total = total or [None] * len(tape.outputs)
                at = tape.leaves_of(position)
                found = tape.match(values[source], worker, position)
                total[at] = add_each(total[at], found)
                continue
            total = part if total is None else add_each(total, part)
        return total or [None] * len(tape.outputs)

    def _weight(self, tape: Tape, values: tuple[Any, ...]) -> float:
        found = self.factor if self.weight is None else self.factor * values[self.weight]
        shard = tape.shard if self.draw is not None else None  # in a training step
        return found * shard.training.scale if shard and shard.training else found


@dataclass(frozen=True)
class WeightBackward:
    """The rest of a split backward: what `Backward` left of the tape `token`, added to gradients.

    `title` and `draw` are the call's.
    """

    token: str
    title: str
    draw: Draw | None

    def run(self, store: Store, *values: Any) -> None:
        """Complete the gradients of the weights; the tape is used."""
        tape = store.weight_tape(self.token)
        shard, uses, parameters = tape.shard, tape.uses, tape.parameters
        with exclusive(shard):
            shared = [use.cotangent for use in uses.recorded]
            try:
                with tape.lock:
                    grads = uses.gradients(parameters.values(), retain=False)
            except BaseException as error:
                raise backward_error(error, store.worker, self.title, self.draw) from error
            found = own({name: grads.get(p) for name, p in parameters.items()}, shared)
            totals = {name: add(tape.found[name], grad) for name, grad in found.items()}
            accumulate_each(shard, totals, worker=store.worker, draw=self.draw)


@dataclass(frozen=True)
class CheckCotangent:
    """Check that a cotangent fits the output whose tape is under `token`, before a tape is used."""

    token: str

    def run(self, store: Store, cotangent: Any) -> None:
        """Raise CotangentError unless it does."""
        store.tape(self.token, keep=True).match(cotangent, store.worker)


def _check_reached(
    draw: Draw,
    worker: WorkerName,
    found: dict[int, list[Gradient]],
    parameters: dict[str, Gradient],
) -> None:
    """Raise LayerError if the gradient of a step's loss reaches no output of the model."""
    grads = [*parameters.values(), *(g for leaves in found.values() for g in leaves)]
    if all(g is None for g in grads):
        error = TypeError(
            "the loss does not depend on what is trained, so that nothing would be: it was "
            "computed from a number (.item()), or from something else than the model's output"
        )
        message = (
            f"layer 'loss' on worker {worker}, in microbatch {draw.microbatch} of step "
            f"{draw.step}: {error}"
        )
        raise LayerError(message, "loss", worker.address, error)


def _on(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    return to_device(staged(part, device), device)


def _seed(tape: Tape, worker: WorkerName, weight: float) -> torch.Tensor:
    (output, *more) = tape.outputs
    if more or not isinstance(output, torch.Tensor) or output.numel() != 1:
        value = tape.output_structure.build(tape.outputs)
        raise CotangentError(
            f"backward() without a cotangent needs a scalar output; {tape.title!r} on worker "
            f"{worker} gave {describe(value)}. Pass a cotangent of that shape"
        )
    return torch.full_like(output, weight)


def _collectives(comm: Communicator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An output and a taker between which autograd goes through all collectives, if any."""
    if comm.token is comm.start:
        return []
    if in_use():  # its backward runs in a thread of torch's
        comm.keep_no_thread()
    return [(comm.token, comm.start)]


def _differentiate(
    tape: Tape,
    seeds: list[Gradient],
    slots: dict[int, list[Gradient]],
    roots: list[tuple[Root, torch.Tensor]],
    retain: bool,
) -> tuple[dict[int, list[Gradient]], dict[str, Gradient]]:
    outputs: list[Root] = []
    given: list[torch.Tensor] = []
    for output, seed in zip(tape.outputs, seeds, strict=True):
        if seed is not None and output.requires_grad:
            outputs.append(output)
            given.append(_on(output.device, seed))
    for root, part in roots:
        outputs.append(root)
        given.append(part)
    takers = [leaf for leaves in slots.values() for leaf in leaves if leaf is not None]
    takers += tape.parameters.values()
    taken: list[Gradient] = [*given]
    ends = _collectives(tape.communicator) if tape.communicator is not None else []
    grads: Sequence[Gradient] = (None,) * len(takers)
    if ends or (outputs and takers):
        outputs += [last for last, _ in ends]
        given += [torch.zeros_like(last) for last, _ in ends]
        grads = gradients(outputs, [*takers, *(first for _, first in ends)], given, retain=retain)
    rest = iter(grads[: len(takers)])
    found = {
        i: [next(rest) if leaf is not None else None for leaf in leaves]
        for i, leaves in slots.items()
    }
    for leaves in found.values():
        taken += leaves
    return found, own(dict(zip(tape.parameters, rest, strict=True)), taken)
