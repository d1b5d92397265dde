"""Check, before training starts, that the workers have memory for it."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from dask.utils import format_bytes

from taskgrad.chain import GraphChain
from taskgrad.errors import MemoryLimitError
from taskgrad.graph.shards import Shard
from taskgrad.layout import Layout
from taskgrad.replicated_layout import ReplicatedLayout
from taskgrad.train.chain_group import ChainGroup
from taskgrad.train.optimizer_factory import example_of, state_per_parameter
from taskgrad.worker.offload import CHUNK

logger = logging.getLogger("taskgrad")

InFiles = dict[str, frozenset[str]]
"""By worker, what is kept in files: the optimizer's "state", the copies that "undo" a step."""


class _Need(NamedTuple):
    """What training takes on one worker, in bytes."""

    used: int
    """What the process uses now and keeps: not gradients and optimizer state, which are new."""
    gradients: int
    state: int
    """Of the optimizer, and averages of the weights."""
    copies: int
    """Of the optimizer's state and parameters, to take a step back."""
    total: int
    """All but the copies."""
    least: int
    """The same with the state in files."""


def _need(
    layout: Layout, shard: Shard, used: int, kept: float, sets_of_gradients: int, averages: bool
) -> _Need:
    """`kept` is the optimizer's state for each byte of parameters."""
    trained = {
        name: layout.tensors[name].nbytes
        for name in set(layout.at(shard).held_on(shard)).intersection(layout.trainable)
    }
    largest = max(trained.values(), default=0)
    own = sum(n for name, n in trained.items() if layout.home(name) is shard)
    gradients, state = sets_of_gradients * sum(trained.values()), int((kept + averages) * own)
    total = used + gradients + state + 2 * largest
    least = total - state + min(state, int((kept + averages) * max(CHUNK, largest)))
    return _Need(used, gradients, state, int(kept * own) + own, total, least)


def _parameters(layout: Layout, shard: Shard) -> int:
    found = (layout.tensors[name] for name in layout.at(shard).held_on(shard))
    return sum(info.nbytes for info in found if not info.is_buffer)


def check_fits(
    chain: GraphChain | ChainGroup,
    layout: Layout,
    optimizer: Any,
    microbatches: int,
    accumulate: int,
    *,
    averages: bool,
) -> InFiles:
    """The workers that have to keep state in files, and which; raises if that is not enough.

    Counted are the memory that each worker's process uses now, and what training adds: the
    gradients, those of a microbatch until they are added to the others, what accumulating keeps to
    take a step back, the optimizer's state and working space, averages of the weights if there are
    any, and copies of state and parameters while it takes a step. Activations come on top, and
    depend on the batch: they are not counted. Of layers on a GPU all of that is in the memory of
    the GPU, and no file takes its place.

    Raises TypeError if the optimizer is not one; MemoryLimitError if workers are too small, with
    what each needs and how much is missing.
    """
    kept = state_per_parameter(optimizer, layout) or 0
    # One parameter after the other: torch's own optimizers do that, others may look at all.
    by_parameter = type(example_of(optimizer, layout)[0]).__module__.startswith("torch.optim")
    kind = "optimizer state and averages" if averages else "optimizer state"
    sets_of_gradients = 1 + (microbatches > 1 or accumulate > 1) + (accumulate > 1)
    if isinstance(layout, ReplicatedLayout) and microbatches > len(layout.replicas):
        sets_of_gradients += 1  # of the next microbatch, while those before it are summed
    room = layout.session.memory([shard.worker for shard in layout.shards])
    devices = {w: tuple(sizes.values()) for w, sizes in chain.layout.device_memory().items()}
    if not any(room.values()) and not devices:
        return {}
    in_files: InFiles = {}
    problems = []
    held = {row.worker: row for row in chain.memory()}
    for shard in layout.shards:
        worker = shard.worker
        named = layout.session.describe(worker)
        device = chain.layout.devices.get((shard.replica_of or shard).worker, "cpu")
        # Of a replica's device nothing is known before its layers are there.
        found = room[worker] if device == "cpu" else devices.get(worker)
        if found is None:
            continue
        used, limit = found
        if worker in held:
            used -= held[worker].gradients + held[worker].optimizer
        else:  # the layers of a replica are to come
            own = layout.at(shard)
            used += sum(layout.tensors[name].nbytes for name in own.held_on(shard))
        need = _need(layout, shard, used, kept, sets_of_gradients, averages)
        if need.total + need.copies <= limit:
            continue
        if need.total <= limit and device != "cpu":
            continue  # copies for which a device has no memory are made in the host's
        if need.total <= limit:
            in_files[worker] = frozenset({"undo"})
            logger.warning(
                "%s writes %s to files in every step, what would take it back: it has no "
                "memory for copies of parameters and optimizer state. More workers, or more "
                "memory, make steps faster",
                named,
                format_bytes(need.copies),
            )
            continue
        spills = by_parameter and device == "cpu"
        if spills and need.least <= limit:
            in_files[worker] = frozenset({"state", "undo"})
            logger.warning(
                "%s keeps %s of %s in files: it has no memory for them. More "
                "workers, or more memory, make steps faster",
                named,
                format_bytes(need.state),
                kind,
            )
            continue
        missing = (need.least if spills else need.total) - limit
        where = "memory" if device == "cpu" else f"the memory of {device}"
        problems.append(
            f"{named} may use {format_bytes(limit)} of {where} and uses {format_bytes(used)} "
            f"already, {format_bytes(_parameters(layout, shard))} of that for this chain's "
            f"parameters; training adds {format_bytes(need.gradients)} of gradients and "
            f"{format_bytes(need.state)} of {kind}: {format_bytes(missing)} are missing"
            + (f", even with the {kind} in files" if spills and need.state else "")
        )
    if problems:
        raise MemoryLimitError(
            "; ".join(problems)
            + ". Spread the model over more workers, give them more memory, or take an optimizer "
            "that keeps less"
        )
    return in_files
