"""Assign the layers of a model to the workers of a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import nn

from taskgrad.arguments import shown
from taskgrad.cluster.session import Session, WorkerSpec
from taskgrad.errors import PlacementError
from taskgrad.graph.deferred_init import named_tensors
from taskgrad.graph.layers import Model
from taskgrad.graph.memory_layout import overlapping
from taskgrad.plan.costs import LayerCost, layer_costs
from taskgrad.plan.placement import contiguous, round_robin, there_and_back

Placement = Literal["round_robin", "v"] | Sequence[WorkerSpec] | None
"""How the layers of a chain are placed; see `GraphChain`."""


Device = str | torch.device
"""A device of torch, or its name."""


def check_devices(
    device: Device | Mapping[WorkerSpec, Device] | None, owner: Session
) -> str | dict[str, str] | None:
    """The name of one device for all workers, or those of some workers by their addresses.

    TypeError and ValueError as `check_device`; PlacementError for a worker that is not there.
    """
    if device is None:
        return None
    if not isinstance(device, Mapping):
        return check_device(device)
    workers = owner.workers()
    return {owner.resolve(spec, workers): check_device(one) for spec, one in device.items()}


def check_device(device: Device) -> str:
    """The name of a device, as it is sent to workers; they check that they have it.

    TypeError if it is neither a string nor a device; ValueError if torch knows no such device, or
    it is the meta device.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device is a string or a torch.device; got {shown(device)}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is one of torch's, such as 'cuda'; got {shown(device)}") from None
    if found.type == "meta":
        raise ValueError(
            "device is where the layers compute, and on the meta device nothing is computed. For a "
            "model that is on the meta device leave device= out"
        )
    return str(found)


class Placed(NamedTuple):
    """The worker of each layer, an address, and the layers that start a stage in any case.

    A layer also starts one where the layer before it is on another worker. `costs` are what was
    balanced; None if the placement was given.
    """

    workers: list[str]
    starts: frozenset[int] = frozenset()
    costs: list[LayerCost] | None = None


def place(
    flat: Model,
    reached: Sequence[Sequence[torch.Tensor]],
    placement: Placement,
    stages_per_worker: int,
    owner: Session,
) -> Placed:
    """Place the layers; `placement` and `stages_per_worker` are those of `GraphChain`.

    `reached` are the tensors that are sent with each layer. PlacementError if the placement has the
    wrong length, names a worker that is not there, or separates layers that share what cannot have
    a copy; or if there are several stages a worker that `placement` does not leave open.
    """
    if stages_per_worker > 1 and placement is not None:
        raise PlacementError(
            f"stages_per_worker={stages_per_worker} is for placement=None, which cuts the layers "
            f"into that many runs a worker; got placement={shown(placement)}"
        )
    workers = owner.workers()
    n = len(flat.layers)
    bonds = list(_bonds(flat, reached))
    if placement is None or (isinstance(placement, str) and placement == "v"):
        per_worker = stages_per_worker if placement is None else 2
        costs = layer_costs(flat.path, flat.modules, flat.activations)
        runs = contiguous([cost.total for cost in costs], per_worker * len(workers))
        count = runs[-1] + 1
        at = there_and_back(count) if placement else round_robin(count, len(workers))
        placed = _together(bonds, [workers[at[run]].address for run in runs])
        starts = [i for i, (before, run) in enumerate(pairwise(runs), 1) if before != run]
        return Placed(placed, frozenset(starts if per_worker > 1 else ()), costs)
    if isinstance(placement, str):
        if placement != "round_robin":
            raise PlacementError(
                'placement is None, "round_robin", "v" or one worker for each layer; got '
                f"{placement!r}"
            )
        robin = [workers[i].address for i in round_robin(n, len(workers))]
        return Placed(_together(bonds, robin))
    if isinstance(placement, bytes | Mapping | Set) or not isinstance(placement, Iterable):
        raise PlacementError(
            'placement is None, "round_robin", "v" or a list with one worker for each layer, in '
            f"their order; got {shown(placement)}"
        )
    placement = list(placement)
    if len(placement) != n:
        raise PlacementError(
            f"the placement names {len(placement)} workers and the model has {n} layers "
            f"({', '.join(layer.name or layer.kind for layer in flat.layers)}): give one for each"
        )
    asked = [owner.resolve(spec, workers) for spec in placement]
    for bond in bonds:
        if asked[bond.first] != asked[bond.second]:
            raise PlacementError(
                f"layer {flat.layers[bond.second].name!r} {bond.why} layer "
                f"{flat.layers[bond.first].name!r} on {owner.describe(asked[bond.first])}: give "
                "the two one worker"
            )
    return Placed(asked)


class _Bond(NamedTuple):
    """Two layers that have to be on one worker: the second one `why` the first, in a message."""

    first: int
    second: int
    why: str


def _bonds(flat: Model, reached: Sequence[Sequence[torch.Tensor]]) -> Iterator[_Bond]:
    """The pairs of layers that share something which cannot have copies on two workers.

    Parameters can have copies, whose gradients are summed. Buffers cannot, as calls write to them.
    Nor can a tensor that a hook or an attribute refers to, or that shows the same memory as another
    one: a copy would not change with it.
    """
    homes: dict[int, tuple[int, str]] = {}
    buffers: dict[int, int] = {}
    own: list[set[int]] = []
    tensors: dict[int, torch.Tensor] = {}
    for index, (layer, module) in enumerate(zip(flat.layers, flat.modules, strict=True)):
        named = named_tensors(module) if isinstance(module, nn.Module) else {}
        own.append({id(t) for t in named.values()})
        for name, tensor in named.items():
            tensors.setdefault(id(tensor), tensor)
            homes.setdefault(id(tensor), (index, ".".join(filter(None, (layer.name, name)))))
        for buffer in module.buffers() if isinstance(module, nn.Module) else ():
            first = buffers.setdefault(id(buffer), index)
            if first != index:
                yield _Bond(first, index, "shares buffers, which both write, with")
    for index, found in enumerate(reached):
        for tensor in found:
            home, name = homes.get(id(tensor), (index, ""))
            if home != index and id(tensor) not in own[index]:
                yield _Bond(home, index, f"uses {name!r} in a hook or an attribute, a tensor of")
    every = list(tensors.values())
    for members in overlapping(every):
        places = [homes[id(every[i])] for i in members]
        for (home, name), (index, other) in pairwise(places):
            if home != index:
                yield _Bond(home, index, f"has {other!r}, which shares memory with {name!r} of")


def _together(bonds: Sequence[_Bond], addresses: list[str]) -> list[str]:
    """The same placement, with bonded layers moved to the worker of the first of them."""
    group = list(range(len(addresses)))
    for bond in bonds:
        ours, theirs = sorted((group[bond.first], group[bond.second]))
        group = [ours if g == theirs else g for g in group]
    return [addresses[g] for g in group]
