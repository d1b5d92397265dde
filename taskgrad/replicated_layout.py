"""The layout of a trainer with replicas: a chain's layers several times, on other workers each.

Every parameter lives on one replica, its home, as a tied parameter lives in one of the stages that
use it: the gradients of all microbatches are summed there in their order, and the others get its
new values. With homes spread over the replicas that is ZeRO stage 1 (Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taskgrad.errors import PlacementError
from taskgrad.graph.calls import Call, Draw
from taskgrad.graph.nodes import new_key
from taskgrad.graph.shards import Shard, ShardCall, copied_names
from taskgrad.layout import Autocast, Extend, Layout, Select
from taskgrad.worker import joining, shard_ops

# Of gradients that are sent together, as of DistributedDataParallel's buckets.
_BUCKET_BYTES = 25 << 20


class ReplicatedLayout(Layout):
    """Replicas of a chain's layers, of which the first is on the chain's own workers.

    Nothing is on the other workers before `install`. A chain on one worker is cut into stages, so
    that gradients travel while the backward of earlier layers runs.

    Parameters
    ----------
    base
        The chain's own layout.
    count
        How many replicas.
    spread
        Have the parameters of a stage live on all of its replicas, in parts of about the same
        bytes; else all live on the first one.

    Attributes
    ----------
    replicas : tuple of Layout
        The layouts of the replicas. Microbatch i is that of replica i modulo their number.

    Raises
    ------
    PlacementError
        There are not as many workers.
    """

    def __init__(self, base: Layout, count: int, *, spread: bool) -> None:
        self._base = base
        maps = _new_shards(base, count)
        self.replicas = tuple(base.on_shards(shards) for shards in maps)
        if len(base.shards) == 1:
            for replica in self.replicas:
                replica.starts |= _buckets(base)
        vars(self).update(vars(self.replicas[0]))  # all of a layout but what follows
        self.shards = tuple(shard for shards in maps for shard in shards.values())
        self.devices = {
            new.worker: base.devices[old.worker] for shards in maps for old, new in shards.items()
        }
        self._homes = self._choose_homes(maps, spread)
        for replica in self.replicas:
            for shard in replica.shards:
                for name in set(replica.held_on(shard)) & self._homes.keys():
                    home = self._homes[name]
                    if home is not shard:
                        shard.homes[name] = home
        for old in base.shards:
            for name in old.hooked:
                self.home(name).hooked.add(name)

    def _choose_homes(
        self, maps: Sequence[Mapping[Shard, Shard]], spread: bool
    ) -> dict[str, Shard]:
        """The shard where each trainable parameter lives: the largest first, where least is."""
        held = dict.fromkeys(self.shards, 0)
        homes = {}
        largest_first = sorted(
            self._base.trainable, key=lambda name: self._base.tensors[name].nbytes, reverse=True
        )
        for name in largest_first:
            old = self._base.home(name)
            places = [shards[old] for shards in maps]
            home = min(places, key=held.__getitem__) if spread else places[0]
            held[home] += self._base.tensors[name].nbytes
            homes[name] = home
        return homes

    @property
    def is_traced(self) -> bool:  # type: ignore[override]
        """That of the chain."""
        return self._base.is_traced

    def home(self, name: str) -> Shard:
        return self._homes.get(name) or super().home(name)

    def at(self, shard: Shard) -> Layout:
        return next(replica for replica in self.replicas if shard in replica.shards)

    def of(self, microbatch: int) -> Layout:
        """The layout of the replica that takes a microbatch of a step."""
        return self.replicas[microbatch % len(self.replicas)]

    def calls(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
        select: Select | None = None,
        draw: Draw | None = None,
    ) -> list[Call]:
        replica = self.of(0 if draw is None else draw.microbatch)
        return replica.calls(
            args, kwargs, mode=mode, autocast=autocast, extend=extend, select=select, draw=draw
        )

    def planned_calls(self, select: Select | None = None) -> list[Call]:
        return self.replicas[0].planned_calls(select)

    def plan_by(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        autocast: Autocast,
        select: Select | None,
    ) -> None:
        for replica in self.replicas:
            replica.plan_by(args, kwargs, autocast, select)

    def may_end_at(self, shard: Shard) -> bool:
        return any(shard in r.shards and r.may_end_at(shard) for r in self.replicas)

    def install(self) -> None:
        """Put the layers, as the chain has them now, on all workers of the replicas."""
        copied = copied_names(self.shards)
        store_ids = self.session.store_ids([shard.worker for shard in self.shards])
        fetches = {
            shard: self._base.task(shard, shard_ops.fetch, {"mode": None})
            for shard in self._base.shards
        }
        installs = []
        for replica in self.replicas:
            for shard in replica.shards:
                base = shard.replica_of
                assert base is not None
                if base.worker == shard.worker:
                    part = joining.Part(base.token, 0, "")
                    arguments: dict[str, Any] = {"parts": [part], "copied": copied.get(shard, [])}
                    installs.append(ShardCall(shard, joining.join, arguments, key=shard.token))
                    continue
                kind = self._base.devices[base.worker].partition(":")[0]
                arguments = {
                    "names": replica.parameters_on(shard),
                    "device": None if kind == "cpu" else kind,
                    "store_id": store_ids[shard.worker],
                    "copied": copied.get(shard, []),
                }
                installs.append(
                    ShardCall(
                        shard,
                        shard_ops.replicate,
                        arguments,
                        key=shard.token,
                        after=[fetches[base]],
                    )
                )
        self.run(installs)
        for call in installs:
            self.executor.hold(call.shard, call)
        for call, place in zip(installs, self.results(installs), strict=True):
            if place is not None:
                worker = call.shard.worker
                self.devices[worker] = place


def _buckets(base: Layout) -> frozenset[int]:
    """The layers that start a stage so that each but the first has so many bytes of gradients.

    Those of a stage are sent when its backward is done, while that of the one before runs.
    """
    starts = []
    size = 0
    for layer in reversed(base.layers):
        size += sum(base.tensors[name].nbytes for name in base.trained_by(layer))
        if size >= _BUCKET_BYTES:
            starts.append(layer.index)
            size = 0
    return frozenset(starts)


def _new_shards(base: Layout, count: int) -> list[dict[Shard, Shard]]:
    """For each replica its shards, by those of the chain."""
    own = [shard.worker for shard in base.shards]
    there = [worker.address for worker in base.session.workers()]
    others = [address for address in there if address not in own]
    needed = (count - 1) * len(own)
    if len(others) < needed:
        stages = f"{len(own)} worker{'s' if len(own) > 1 else ''}"
        raise PlacementError(
            f"replicas={count} of a chain on {stages} need {count * len(own)} workers, and the "
            f"cluster has {len(there)}: start more, or give the chain fewer with placement="
        )
    places = [*own, *others]

    def shard_at(old: Shard, worker: str) -> Shard:
        return Shard(base.ref, new_key("shard", base.title), worker, replica_of=old)

    return [
        {old: shard_at(old, places[r * len(own) + i]) for i, old in enumerate(base.shards)}
        for r in range(count)
    ]
