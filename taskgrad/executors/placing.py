"""Which worker of this cluster each layer of this model goes to, and whether it can go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Literal

import torch
from torch import nn

from taskgrad.arguments import shown
from taskgrad.cluster.session import Session, WorkerSpec
from taskgrad.errors import PlacementError
from taskgrad.graph import pack
from taskgrad.graph.layers import Model
from taskgrad.plan.costs import layer_costs
from taskgrad.plan.placement import contiguous, round_robin


def check_picklable(flat: Model) -> None:
    """Raise TypeError naming the layer that cannot be sent to a worker, if there is one."""
    for layer, module in zip(flat.layers, flat.modules, strict=True):
        try:
            pack.pack(module)
        except Exception as error:
            raise TypeError(
                f"layer {layer.name!r} ({layer.kind}) cannot be sent to a worker, because it "
                f"cannot be pickled ({type(error).__name__}: {error}). Take what cannot be "
                "pickled (locks, open files, generators) out of it, or make it in forward()"
            ) from error


def check_device(device: str | torch.device) -> str:
    """A device as workers are told it; whether they have it they know themselves.

    Raises
    ------
    TypeError
        It is neither a string nor a device.
    ValueError
        Torch knows no such device, or nothing is computed there.
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


def place(
    flat: Model,
    placement: Literal["round_robin"] | Sequence[WorkerSpec] | None,
    owner: Session,
) -> list[str]:
    """The address of each layer's worker; the arguments are those of `GraphChain`.

    Raises
    ------
    PlacementError
        The placement has the wrong length, names a worker that is not there, or parts layers that
        share buffers.
    """
    workers = owner.workers()
    n = len(flat.layers)
    if placement is None:
        indices = contiguous(layer_costs(flat.path, flat.modules), len(workers))
        return _together(flat, [workers[i].address for i in indices])
    if isinstance(placement, str):
        if placement != "round_robin":
            raise PlacementError(
                f'placement is None, "round_robin" or one worker for each layer; got {placement!r}'
            )
        return _together(flat, [workers[i].address for i in round_robin(n, len(workers))])
    if isinstance(placement, bytes | Mapping | Set) or not isinstance(placement, Iterable):
        raise PlacementError(
            'placement is None, "round_robin" or a list with one worker for each layer, in their '
            f"order; got {shown(placement)}"
        )
    placement = list(placement)
    if len(placement) != n:
        raise PlacementError(
            f"the placement names {len(placement)} workers and the model has {n} layers "
            f"({', '.join(layer.name or layer.kind for layer in flat.layers)}): give one for each"
        )
    asked = [owner.resolve(spec, workers) for spec in placement]
    for layer, here, needed in zip(flat.layers, asked, _together(flat, asked), strict=True):
        if here != needed:
            raise PlacementError(
                f"layer {layer.name!r} shares buffers with a layer on worker {needed}, and both "
                "write them: give the two one worker"
            )
    return asked


def _together(flat: Model, addresses: list[str]) -> list[str]:
    """The same placement, but layers that share buffers are where the first of them is.

    A parameter can have a copy, whose gradients are summed; a buffer is written as calls run.
    """
    first: dict[int, str] = {}
    found = []
    for module, address in zip(flat.modules, addresses, strict=True):
        buffers = list(module.buffers()) if isinstance(module, nn.Module) else []
        address = next((first[id(b)] for b in buffers if id(b) in first), address)
        first |= {id(b): address for b in buffers}
        found.append(address)
    return found
