"""Operations on a shard, on its worker: install it, read it, sum gradients, write parameters.

Every function takes the worker's store, the shard's token, and plain arguments.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from taskgrad.errors import WorkerLostError
from taskgrad.graph import pack
from taskgrad.graph.deferred_init import InitPlan, TensorSpec
from taskgrad.graph.memory_layout import View
from taskgrad.worker.devices import assigned, device_memory
from taskgrad.worker.gradients import accumulate_into, summed
from taskgrad.worker.hooks import hooked_gradient
from taskgrad.worker.materialize import make_values
from taskgrad.worker.memory import store_bytes
from taskgrad.worker.settings import YieldingLock
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store


def install(
    store: Store,
    token: str,
    tensors: list[torch.Tensor | TensorSpec | View],
    *,
    data: bytes,
    names: dict[str, tuple[int, str]],
    device: str | None,
    store_id: str,
    init_plans: dict[int, InitPlan],
    seed: int,
    copied: list[str],
) -> str:
    """Unpack layers and keep them as a shard, unless it exists; returns the device they are on.

    `names` maps the chain's name of each parameter to (layer index, name in the layer); by layer
    index `init_plans` say how values that were not sent are made; `copied` are the parameters of
    which other shards have copies.

    Raises LayerError or CheckpointError if values cannot be made, or read; WorkerLostError if this
    is not the store with `store_id`: when a worker is lost, Dask runs again what ran there; that
    would put the first weights in the place of the trained ones.
    """
    if store.id != store_id:
        raise WorkerLostError(
            f"the worker that held {token.partition('-')[0]!r} is gone, and with it its layers; "
            f"worker {store.worker} cannot take its place. Make the chain again"
        )
    known = store.get(token)
    if known is not None:  # trained meanwhile
        return str(known.device)
    there = torch.device("cpu") if device is None else assigned(device)
    values = [
        t.empty(there) if isinstance(t, TensorSpec) else t if isinstance(t, View) else t.clone()
        for t in tensors
    ]
    layers: dict[int, Any] = pack.unpack(data, values, own=True)
    # In reverse: of layers that share a parameter the first one sets it last.
    for index in reversed(init_plans):
        make_values(layers[index], init_plans[index], seed, store.worker)
    modules = [m for m in layers.values() if isinstance(m, nn.Module)]
    place = there
    if device is None:
        place = next((t.device for m in modules for t in [*m.parameters(), *m.buffers()]), there)
    for module in modules if device is not None else ():
        module.to(there)
    parameters = {name: layers[i].get_parameter(local) for name, (i, local) in names.items()}
    trainable = frozenset(name for name, p in parameters.items() if p.requires_grad)
    lock = YieldingLock(store.give_thread_back)
    store.put(
        token,
        ResidentShard(layers, parameters, place, frozenset(copied), trainable, lock=lock),
    )
    return str(place)


def fetch(
    store: Store, token: str, *, mode: bool | None
) -> tuple[bytes, list[torch.Tensor | View]]:
    """The shard's layers, packed, their tensors as copies on the host."""
    with store.locked(token) as shard:
        shard.set_mode(mode)
        packed = pack.pack(shard.layers, hooks=True)
        return packed.data, [t if isinstance(t, View) else _copy(t) for t in packed.laid_out()]


def replicate(
    store: Store,
    token: str,
    fetched: tuple[bytes, list[torch.Tensor | View]],
    *,
    names: dict[str, tuple[int, str]],
    device: str | None,
    store_id: str,
    copied: list[str],
) -> str:
    """Install the layers that `fetch` gave on another worker; for the rest see `install`."""
    data, tensors = fetched
    return install(
        store,
        token,
        list(tensors),
        data=data,
        names=names,
        device=device,
        store_id=store_id,
        init_plans={},
        seed=0,
        copied=copied,
    )


def give_buffers(store: Store, token: str) -> list[torch.Tensor]:
    """Copies of all buffers of the shard's layers."""
    with store.locked(token) as shard:
        return [_copy(buffer) for buffer in shard.all_modules.members().buffers]


def set_buffers(store: Store, token: str, *given: list[torch.Tensor]) -> None:
    """Write the values that `give_buffers` gave for the same layers on another worker."""
    [values] = given
    with store.locked(token) as shard, torch.no_grad():
        for buffer, value in zip(shard.all_modules.members().buffers, values, strict=True):
            buffer.copy_(value)


def _copy(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to("cpu", copy=True)


def state(store: Store, token: str) -> dict[int, dict[str, Any]]:
    """Each layer's state_dict, by index, as copies on the host."""
    with store.locked(token) as shard:
        return {
            i: {
                k: _copy(v) if isinstance(v, torch.Tensor) else v
                for k, v in layer.state_dict().items()
            }
            for i, layer in shard.modules.items()
        }


def memory(store: Store, token: str) -> dict[str, int]:
    """Bytes that the shard and its tapes hold, by what holds them."""
    with store.locked(token) as shard:  # no backward of it frees a tape that is looked at
        entries = store.entries()
        mine = {k: e for k, e in entries.items() if getattr(e, "shard", e) is shard}
        return asdict(store_bytes(mine)[token])


def memory_of_device(store: Store, token: str) -> dict[str, int]:
    """Bytes of the shard's device that are in use, and that it has; empty for the CPU."""
    found = device_memory(store.shard(token).device)
    return {} if found is None else {"device_used": found[0], "device_total": found[1]}


def zero_grad(store: Store, token: str) -> None:
    """Drop the gradients."""
    with store.locked(token) as shard:
        for parameter in shard.parameters.values():
            parameter.grad = None


def gradient(store: Store, token: str, *, name: str) -> torch.Tensor | None:
    """A copy of one parameter's gradient; later steps do not write into it."""
    with store.locked(token) as shard:
        grad = shard.parameters[name].grad
        return None if grad is None else _copy(grad)


def accumulate(store: Store, token: str, *values: Any, parts: dict[str, list[str | int]]) -> None:
    """Add the gradients of a backward to the parameters'.

    `parts` lists for each parameter what to sum, in order: the key of a backward task on this
    worker, or the position among `values` of a gradient from another worker.
    """
    with store.locked(token) as shard:
        for name, sources in parts.items():
            found = store.parts(name, sources, values)
            accumulate_into(shard, name, found, values, worker=store.worker)


def accumulate_taken(
    store: Store,
    token: str,
    *values: list[torch.Tensor | None],
    parts: dict[str, list[tuple[int, int]]],
    own: list[int],
) -> None:
    """Add the gradients that backwards gave up to the parameters'; see `TakeGradients`.

    `parts` lists for each parameter what to sum, in order, as (position among the values, in it).
    The values at the positions `own` are from this worker, and nobody else's.
    """
    borrowed = [grad for i, grads in enumerate(values) if i not in own for grad in grads]
    with store.locked(token) as shard:
        for name, places in parts.items():
            found = [values[i][at] for i, at in places]
            accumulate_into(shard, name, found, borrowed, worker=store.worker)


def hooked(store: Store, token: str, *parts: torch.Tensor | None, name: str) -> Any:
    """The sum of a parameter's gradients after its hooks, on the host; None if there are none.

    Nothing is accumulated, as in ``torch.autograd.grad``.
    """
    with store.locked(token) as shard:
        parameter = shard.parameters[name]
        total = summed(parameter, parts, parts)
        if total is None:
            return None
        return hooked_gradient(parameter, total, name=name, worker=store.worker).cpu()


def give(store: Store, token: str, *, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies of these parameters."""
    with store.locked(token) as shard:
        return shard.values(names)


def set_parameters(store: Store, token: str, *values: dict[str, torch.Tensor]) -> None:
    """Write new values into this shard's copies of parameters that live elsewhere."""
    with store.locked(token) as shard, torch.no_grad():
        for new in values:
            for name, value in new.items():
                if name in shard.parameters:
                    shard.parameters[name].copy_(value)
