"""What one worker holds of a chain, and calls of functions on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

from taskgrad.graph.layers import Model, owner_of
from taskgrad.graph.nodes import Node, label_of, new_key
from taskgrad.graph.torch_settings import settings_now


class ChainRef:
    """What tells the shards of one chain from those of another: its title, and identity.

    `trained_by` returns the Trainer or Optimizer that trains them, None if there is none now. If it
    no longer exists, `recover` takes back a step that it left unfinished. `has_averages` is True
    while averages of the parameters are in their place. `replicas` are the shards of a trainer with
    replicas of the chain, also those on the chain's own workers.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.trained_by: Callable[[], Any] = lambda: None
        self.recover: Callable[[], None] = lambda: None
        self.has_averages = False
        self.replicas: WeakSet[Shard] = WeakSet()


class Shard:
    """Layers of one chain on one worker, as the driver knows them.

    `token` is the key of the task that put them there, whose result an executor holds for as long
    as this object exists. Every call of the shard refers to it. `homes` names the shards where
    parameters live of which this one has a copy, because they are tied over two workers; `hooked`
    are the parameters that live here with hooks on their gradients. Of a trainer's replicas,
    `replica_of` is the chain's shard that it has the layers of: there the gradients of microbatches
    are summed in the order of these, whichever replica they are from.
    """

    def __init__(
        self, chain: ChainRef, token: str, worker: str, replica_of: Shard | None = None
    ) -> None:
        self.chain = chain
        self.token = token
        self.worker = worker
        self.replica_of = replica_of
        self.homes: dict[str, Shard] = {}
        self.hooked: set[str] = set()

    def home(self, parameter: str) -> Shard:
        """The shard that owns a parameter of this one; its gradients are summed there.

        The word is that of directory-based cache coherence: the home of what has copies elsewhere.
        """
        return self.homes.get(parameter, self)


def shards_of(chain: ChainRef, model: Model, workers: Sequence[str]) -> list[Shard]:
    """The shard of each layer, given its worker; one shard a worker."""
    shards = {w: Shard(chain, new_key("shard", chain.title), w) for w in dict.fromkeys(workers)}
    by_name = {layer.name: layer for layer in reversed(model.layers)}
    for info in model.tensors.values():
        home, *others = [shards[workers[owner_of(n, by_name).index]] for n in info.names]
        for shard in others:
            if shard is not home:
                shard.homes[info.name] = home
        if info.hooked:
            home.hooked.add(info.name)
    return [shards[worker] for worker in workers]


def copied_names(shards: Iterable[Shard]) -> dict[Shard, list[str]]:
    """For each shard the parameters that live there and of which others have copies, sorted."""
    found: dict[Shard, set[str]] = {}
    for shard in shards:
        for name, home in shard.homes.items():
            found.setdefault(home, set()).add(name)
    return {home: sorted(names) for home, names in found.items()}


class ShardCall(Node):
    """Something done to or read from a shard where it lives: gradients, an optimizer step.

    `function` is one of `taskgrad.worker`, called there with the store, the shard's token and the
    values of `after`, in order; `arguments` are its keyword arguments as plain data.
    """

    __slots__ = ("arguments", "function", "shard")

    def __init__(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        key: str,
        after: Sequence[Node] = (),
        awaits: Sequence[Node] = (),
    ) -> None:
        # The default device is the shard's own, not that of this process.
        settings = settings_now().without_device()
        super().__init__(key, shard.worker, after, settings=settings, awaits=tuple(awaits))
        self.shard = shard
        self.function = function
        self.arguments = arguments

    @property
    def label(self) -> str:
        step = self.arguments.get("step")
        return label_of(self.key) + ("" if step is None else f" of step {step}")
