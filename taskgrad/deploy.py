"""Put the layers of a model on their workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from taskgrad.graph import pack
from taskgrad.graph.deferred_init import InitPlan, TensorSpec, unsent_tensors
from taskgrad.graph.layers import Model, local_name
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.shards import ShardCall, copied_names
from taskgrad.layout import Layout
from taskgrad.worker import shard_ops


def deploy(
    layout: Layout, flat: Model, device: str | None, init_plans: Mapping[int, InitPlan], seed: int
) -> dict[str, str]:
    """Send every shard to its worker; returns the device that each ended up on.

    `init_plans` say which values are not sent, and how they are made there, from streams fixed by
    `seed`.
    """
    copied = copied_names(layout.shards)
    store_ids = layout.session.store_ids([shard.worker for shard in layout.shards])
    unsent = unsent_tensors(flat, init_plans)
    installs = []
    for shard in layout.shards:
        here = [layer.index for layer in layout.layers if layout.shard_of(layer) is shard]
        names: dict[str, tuple[int, str]] = {}
        for info in flat.tensors.values():
            for name in info.names:
                layer = layout.owner(name)
                if not info.is_buffer and layout.shard_of(layer) is shard:
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
    layout.run(installs)
    for call in installs:
        layout.executor.hold(call.shard, call)
    if init_plans:
        layout.copy_tied()
    places = layout.results(installs)
    return {c.shard.worker: place for c, place in zip(installs, places, strict=True)}
