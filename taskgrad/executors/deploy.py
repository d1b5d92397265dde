"""Put the layers of a model on their workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from taskgrad.cluster.session import Session
from taskgrad.executors.base import Executor
from taskgrad.executors.registry import executor_of
from taskgrad.graph import pack
from taskgrad.graph.deferred_init import InitPlan, TensorSpec, unsent_tensors
from taskgrad.graph.layers import Model, local_name, owner_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import new_key
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.worker import shard_ops


def install(
    flat: Model,
    shard_of: Sequence[Shard],
    device: str | None,
    init_plans: Mapping[int, InitPlan],
    seed: int,
    session: Session,
) -> dict[str, str]:
    """Send every shard to its worker; returns the device that each ended up on.

    `shard_of` is the shard of each layer; `init_plans` say which values are not sent, and how they
    are made there, from streams fixed by `seed`.
    """
    by_name = {layer.name: layer for layer in reversed(flat.layers)}
    shards = list(dict.fromkeys(shard_of))
    copied = copied_names(shards)
    store_ids = session.store_ids([shard.worker for shard in shards])
    unsent = unsent_tensors(flat, init_plans)
    installs = []
    for shard in shards:
        here = [i for i, s in enumerate(shard_of) if s is shard]
        names: dict[str, tuple[int, str]] = {}
        for info in flat.tensors.values():
            for name in info.names:
                layer = owner_of(name, by_name)
                if not info.is_buffer and shard_of[layer.index] is shard:
                    names.setdefault(info.name, (layer.index, local_name(name, layer)))
        packed = pack.pack({i: flat.modules[i] for i in here}, hooks=True)
        arguments = {
            "data": packed.data,
            "names": names,
            "device": device,
            "store_id": store_ids[shard.worker],
            "init_plans": {i: init_plans[i] for i in here if i in init_plans},
            "seed": seed,
            "copied": copied.get(shard, []),
        }
        sent = [
            TensorSpec.of(t) if isinstance(t, torch.Tensor) and id(t) in unsent else t
            for t in packed.laid_out()
        ]
        values = Leaf(sent, needs_grad=False)
        installs.append(
            ShardCall(shard, shard_ops.install, arguments, key=shard.token, after=[values])
        )
    executor = executor_of(session)
    executor.run(installs)
    for call in installs:
        executor.hold(call.shard, call)
    if init_plans:
        copy_tied(shards, executor)
    places = executor.values(installs)
    return {c.shard.worker: place for c, place in zip(installs, places, strict=True)}


def copy_tied(shards: Sequence[Shard], executor: Executor) -> None:
    """Give copies of tied parameters the values that they have where they live."""
    gives = {
        home: ShardCall(home, shard_ops.give, {"names": names}, key=new_key("tied"))
        for home, names in copied_names(shards).items()
    }
    takes = [
        ShardCall(
            shard,
            shard_ops.set_parameters,
            {},
            key=new_key("tied"),
            after=[gives[home] for home in dict.fromkeys(shard.homes.values())],
        )
        for shard in shards
        if shard.homes
    ]
    executor.run(takes)
