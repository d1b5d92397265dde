"""Put the layers of a model on their workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from taskgrad.cluster.session import Session
from taskgrad.executors.futures import run, values_of
from taskgrad.graph import pack
from taskgrad.graph.deferred_init import Hollow, Making, hollow_tensors
from taskgrad.graph.layers import Model, local_name, owner_of
from taskgrad.graph.nodes import Leaf, Stage, StageCall, new_key


def install(
    flat: Model,
    stage_of: Sequence[Stage],
    device: str | None,
    makings: Mapping[int, Making],
    seed: int,
    session: Session,
) -> dict[str, str]:
    """Send every stage to its worker; returns the device that each ended up on.

    `stage_of` is the stage of each layer; `makings` say which values are not sent, and how they are
    made there, from streams fixed by `seed`.
    """
    by_name = {layer.name: layer for layer in reversed(flat.layers)}
    stages = list(dict.fromkeys(stage_of))
    for info in flat.tensors.values():
        holders = [stage_of[owner_of(name, by_name).index] for name in info.names]
        for stage in holders[1:]:
            if stage is not holders[0]:
                stage.homes[info.name] = holders[0]
        if info.hooked:
            holders[0].hooked.add(info.name)
    store_ids = session.store_ids([stage.worker for stage in stages])
    hollow = hollow_tensors(flat, makings)
    installs = []
    for stage in stages:
        here = [i for i, s in enumerate(stage_of) if s is stage]
        names: dict[str, tuple[int, str]] = {}
        for info in flat.tensors.values():
            for name in info.names:
                layer = owner_of(name, by_name)
                if not info.is_buffer and stage_of[layer.index] is stage:
                    names.setdefault(info.name, (layer.index, local_name(name, layer)))
        packed = pack.pack({i: flat.modules[i] for i in here}, hooks=True)
        arguments = {
            "data": packed.data,
            "names": names,
            "device": device,
            "store_id": store_ids[stage.worker],
            "makings": {i: makings[i] for i in here if i in makings},
            "seed": seed,
            "copied": [n for s in stages for n, home in s.homes.items() if home is stage],
        }
        sent = [
            Hollow.of(t) if isinstance(t, torch.Tensor) and id(t) in hollow else t
            for t in packed.laid_out()
        ]
        values = Leaf(sent, needs_grad=False)
        installs.append(StageCall(stage, "install", arguments, key=stage.token, after=[values]))
    run(installs, session)
    for call in installs:
        call.stage.handle = call.result
    if makings:
        copy_tied(stages, session)
    places = values_of(installs, session)
    return {c.stage.worker: place for c, place in zip(installs, places, strict=True)}


def copy_tied(stages: Sequence[Stage], session: Session) -> None:
    """Give copies of tied parameters the values that they have where they live."""
    wanted: dict[Stage, set[str]] = {}
    for stage in stages:
        for name, home in stage.homes.items():
            wanted.setdefault(home, set()).add(name)
    gives = {
        home: StageCall(home, "give", {"names": sorted(names)}, key=new_key("tied"))
        for home, names in wanted.items()
    }
    takes = [
        StageCall(
            stage,
            "set_parameters",
            {},
            key=new_key("tied"),
            after=[gives[home] for home in dict.fromkeys(stage.homes.values())],
        )
        for stage in stages
        if stage.homes
    ]
    run(takes, session)
