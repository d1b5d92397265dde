"""Memory that shards, tapes and gradients hold on a worker, in bytes, counted on request.

A tape's size is that of the distinct memory that its autograd graph keeps, parameters aside: these
count for the shard. Inputs count for every tape that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from taskgrad.graph.nodes import walk
from taskgrad.graph.sparse import components
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Kept
from taskgrad.worker.tape import Tape, WeightTape

PARTS = "parts"
"""The kind of what is kept of sharded tensors."""


@dataclass
class MemoryUsage:
    """Bytes held, by what holds them."""

    parameters: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    tapes: int = 0

    def __add__(self, other: MemoryUsage) -> MemoryUsage:
        return MemoryUsage(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of the distinct memory behind these tensors."""
    found: dict[int, int] = {}
    for t in tensors:
        if not isinstance(t, torch.Tensor) or t.is_meta:
            continue
        for part in components(t):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def shard_bytes(shard: ResidentShard) -> MemoryUsage:
    """Memory of one shard without its tapes. A step may run at the same time.

    What a joined shard has counts for its parts.
    """
    if shard.parts:
        return MemoryUsage()
    trains, own = shard.trains, set(shard.parameters.values())
    # As lists, made in one go: a step adds to what it iterates over.
    every = list(trains.optimizer.state.items()) if trains.optimizer is not None else []
    state = [values for p, values in every if p in own or not isinstance(p, torch.Tensor)]
    spilled = trains.training.spilled if trains.training is not None else None
    if trains.training is not None and trains.training.averages is not None:
        averages = list(trains.training.averages.values.items())
        state.append({n: v for n, v in averages if trains.parameters[n] in own})
    kept = (v for values in state for v in list(values.values()) if isinstance(v, torch.Tensor))
    return MemoryUsage(
        parameters=sum(storages(shard.parameters.values()).values()),
        buffers=sum(storages(b for m in shard.modules.values() for b in m.buffers()).values()),
        gradients=_known_gradient_bytes(shard),
        optimizer=sum(storages(v for v in kept if not (spilled and spilled.holds(v))).values()),
    )


def gradient_bytes(shard: ResidentShard) -> int:
    """Memory of a shard's gradients. The caller holds the shard's lock.

    Without it torch crashes the process if one thread reads ``.grad`` and another replaces it.
    """
    return sum(storages(p.grad for p in shard.parameters.values()).values())


def _known_gradient_bytes(shard: ResidentShard) -> int:
    if shard.lock.acquire(blocking=False):
        try:
            shard.gradient_bytes = gradient_bytes(shard)
        finally:
            shard.lock.release()
    else:
        shard.uncounted = True
    return shard.gradient_bytes


def tape_bytes(tape: Tape | WeightTape) -> int:
    """Memory of one tape: its inputs, outputs, and the tensors that autograd saved between them.

    If layers run again in the backward, only inputs and outputs are counted. While its backward
    runs the last count is returned, 0 if there is none.
    """
    if tape.nbytes is not None:
        return tape.nbytes
    if not tape.lock.acquire(blocking=False):
        return 0
    try:
        tape.nbytes = _kept_bytes(tape)
    finally:
        tape.lock.release()
    return tape.nbytes


def _kept_bytes(tape: Tape | WeightTape) -> int:
    if isinstance(tape, WeightTape):
        uses = tape.uses.recorded
        kept = storages([*(use.cotangent for use in uses), *tape.found.values()])
        kept |= storages(_saved(use.output.node for use in uses))
    else:
        kept = storages([*tape.outputs, *(t for leaves in tape.inputs for t in leaves)])
        if not tape.recomputes:
            nodes = (t.grad_fn for t in tape.outputs if isinstance(t, torch.Tensor))
            kept |= storages(_saved(node for node in nodes if node is not None))
    if tape.shard is not None:
        for address in storages(tape.shard.parameters.values()):
            kept.pop(address, None)
    return sum(kept.values())


def _saved(ends: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Every tensor that the autograd graph behind these nodes has saved."""
    for node in walk(ends, lambda node: [n for n, _ in node.next_functions if n is not None]):
        for name in dir(node):
            if not (name.startswith("_saved_") or name == "saved_tensors"):
                continue
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed by a backward
                continue
            yield from value if isinstance(value, tuple | list) else [value]


def total_bytes(entries: dict[str, Any]) -> dict[str, int]:
    """Memory of all entries of a store, by kind, with that of what is kept of sharded tensors."""
    kept = storages(v for e in entries.values() if isinstance(e, Kept) for v in e.values)
    found = asdict(sum(store_bytes(entries).values(), MemoryUsage()))
    return {**found, PARTS: sum(kept.values())}


def store_bytes(entries: dict[str, Any]) -> dict[str, MemoryUsage]:
    """Memory of each shard and its tapes, by the shard's token.

    Tapes of functions, and gradients that no task has read yet, are under "".
    """
    tokens = {id(e): key for key, e in entries.items() if isinstance(e, ResidentShard)}
    found = {key: shard_bytes(entries[key]) for key in tokens.values()}
    for entry in entries.values():
        if isinstance(entry, Tape | WeightTape):
            token = tokens.get(id(entry.shard), "")
            found[token] = found.get(token, MemoryUsage()) + MemoryUsage(tapes=tape_bytes(entry))
        elif isinstance(entry, dict):
            size = sum(storages(entry.values()).values())
            found[""] = found.get("", MemoryUsage()) + MemoryUsage(gradients=size)
    return found
