"""A shard: the layers of a chain on one worker, with their parameters, and what trains them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.graph.calls import LayerStep
from taskgrad.worker.settings import JointLock, YieldingLock
from taskgrad.worker.stage_modules import StageModules
from taskgrad.worker.training_state import Training, Update
from taskgrad.worker.undo import Undo


@dataclass
class Trained:
    """What trains a shard. A shard keeps that of its next trainer, and from before a load.

    `compiled` are options of ``torch.compile`` for the layers. `parts` is what trained the parts of
    a joined shard; `joined` refers to the joined shard that trains a part.
    """

    optimizer: torch.optim.Optimizer | None
    training: Training | None = None
    loss: Any = None
    compiled: dict[str, Any] | None = None
    parts: tuple[Trained, ...] = ()
    joined: weakref.ref[ResidentShard] | None = None


@dataclass
class ResidentShard:
    """The layers of one chain that live here.

    `layers` are modules (or connection functions) by their index in the chain, `names` the chain's
    names for them, `parameters` the trainable and frozen parameters by the chain's first name for
    each. `lock` is held while any of it runs, so that a worker of several threads does not tear it.
    `gradient_bytes` is the last count; `uncounted` asks the holder of the lock to count again.
    `copied` are the parameters of which other shards have copies, `trainable` those that the chain
    knows as such. `parts` are the shards of several chains whose layers this one has, too, to be
    trained together; `joined` refers to the shard that trains this one as a part.
    """

    layers: dict[int, Any]
    parameters: dict[str, nn.Parameter]
    device: torch.device
    copied: frozenset[str] = frozenset()
    trainable: frozenset[str] = frozenset()
    layer_mode: bool | None = None  # True: train, False: eval, None: as the layers came
    optimizer: torch.optim.Optimizer | None = None
    made: Trained | None = None  # for `use`, once every shard has made its own
    before_load: tuple[Undo, Trained] | None = None  # undoes a load that is under way
    update: Update | None = None  # the last step of a `taskgrad.Optimizer`
    loss: Any = None  # the loss function, on the shard with the model's output
    training: Training | None = None  # what a trainer keeps here
    gradient_bytes: int = 0
    uncounted: bool = False
    lock: YieldingLock | JointLock = field(default_factory=YieldingLock)
    parts: tuple[ResidentShard, ...] = ()
    joined: weakref.ref[ResidentShard] | None = None
    _stages: dict[Any, StageModules] = field(default_factory=dict)

    def use(self, trained: Trained) -> None:
        """Replace what trains this shard, and what trains its parts."""
        self.optimizer, self.training, self.loss = trained.optimizer, trained.training, trained.loss
        self.joined = trained.joined
        before = trained.parts or [Trained(None, joined=weakref.ref(self)) for _ in self.parts]
        for part, own in zip(self.parts, before, strict=True):
            part.use(own)

    def set_mode(self, mode: bool | None) -> None:
        """Put all layers in training or evaluation mode, where they are not; None leaves them."""
        for part in self.parts or (self,):
            if mode is not None and mode is not part.layer_mode:
                for layer in part.modules.values():
                    layer.train(mode)
                part.layer_mode = mode

    @property
    def trained(self) -> Trained:
        """What trains this shard and its parts now."""
        parts = tuple([part.trained for part in self.parts])
        return Trained(self.optimizer, self.training, self.loss, parts=parts, joined=self.joined)

    @property
    def trains(self) -> ResidentShard:
        """The shard with the optimizer of these parameters: this one, or that it is joined to."""
        found = None if self.joined is None else self.joined()
        return self if found is None else found

    @property
    def modules(self) -> dict[int, nn.Module]:
        """The layers that are modules, by their index."""
        return {i: m for i, m in self.layers.items() if isinstance(m, nn.Module)}

    def stage(self, steps: Sequence[LayerStep]) -> StageModules:
        """The modules of those steps of a call that are layers; the same object every time."""
        found = self._stages.get(steps)
        if found is None:
            layers = [self.layers[index] for index, _, _ in steps if index in self.layers]
            found = self._stages[steps] = StageModules(layers, self.parameters)
        return found

    @property
    def all_modules(self) -> StageModules:
        """The modules of all layers; the same object every time."""
        if None not in self._stages:
            self._stages[None] = StageModules(self.layers.values(), self.parameters)
        return self._stages[None]

    def values(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Copies of these parameters on the host."""
        return {n: self.parameters[n].detach().to("cpu", copy=True) for n in names}

    def why_fixed(self, name: str) -> str | None:
        """The reason why a hook may not change this parameter now; None if it may."""
        if self.training is not None and self.training.begun is not None:
            return (
                "which a Trainer changes at the end of a step, once all gradients are there: "
                "leave it to the optimizer"
            )
        if name in self.copied:
            return (
                "and layers on other workers have copies of it, which would stay as they are: "
                "give the layers that share it one worker"
            )
        return None
