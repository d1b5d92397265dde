"""Where the layers of a chain are: shards, and calls of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.graph.calls import LOSS, Call, Draw, LayerStep, StepContext
from taskgrad.graph.deferred_init import DeferredInit, TensorSpec, unsent_tensors
from taskgrad.graph.functions import template
from taskgrad.graph.layers import Branches, Layer, Model, Path, local_name, owner_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.graph.pytree import Slot
from taskgrad.graph.sending import is_parametrized, refuse_cached
from taskgrad.graph.shards import ChainRef, Shard, ShardCall, copied_names, shards_of
from taskgrad.graph.torch_settings import TorchSettings, refuse_modes, settings_now
from taskgrad.shard_tasks import ShardTasks
from taskgrad.thunk import Inputs, Thunk
from taskgrad.worker import shard_ops

Autocast = tuple[tuple[str, torch.dtype], ...]
"""Regions of autocast, each (device type, dtype)."""

Extend = Callable[
    [tuple[LayerStep, ...], tuple[Node, ...], bool],
    tuple[tuple[LayerStep, ...], tuple[Node, ...], StepContext],
]
"""(steps, inputs, whether it is the last) of a call -> what a training step makes of them."""

Select = Callable[[Any], Any]
"""Takes what is needed of a model's output. Equal for equal selections."""

# The arguments of a call whose one argument is the result of the call before it.
_ONE_INPUT = template(((Slot(0),), {}))


class Entry(NamedTuple):
    """The arguments of the next call: nodes, and the template that they fill.

    `value` is the node that is its one argument, if it has one and that is a node.
    """

    inputs: tuple[Node, ...]
    template: bytes
    value: Node | None


def entry_of(args: Sequence[Any], kwargs: Mapping[str, Any], title: str) -> Entry:
    """These arguments of a call, pytrees of tensors, thunks, nodes, collections, plain values."""
    inputs = Inputs()
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor | Thunk | Node):
        inputs.slot(args[0])
        return Entry(tuple(inputs.nodes), _ONE_INPUT, inputs.nodes[0])
    given = inputs.template((tuple(args), dict(kwargs)), title)
    return Entry(tuple(inputs.nodes), given, None)


class Walk:
    """One pass over a model's layers, which makes their calls: those of a stage as one.

    All calls have the settings of torch that the first one is made with, unless `begin` sets them.
    """

    def __init__(
        self, layout: Layout, mode: bool | None, autocast: Autocast, extend: Extend | None
    ) -> None:
        self.calls: list[Call] = []
        self._layout = layout
        self._mode = mode
        self._autocast = autocast
        self._extend = extend
        self._settings: TorchSettings | None = None
        self._suffix = ""

    def begin(self, settings: TorchSettings, suffix: str) -> None:
        """Give the next calls these settings of torch, and their steps names with this suffix."""
        self._settings = settings.under_autocast(self._autocast)
        self._suffix = suffix

    def path(self, path: Path, entry: Entry, *, last: bool = False) -> Entry:
        """Make the calls of a path; if `last`, the last one returns the model's output."""
        shard_of = self._layout.shard_of
        row: list[Layer] = []
        for part in path:
            if isinstance(part, Branches):
                entry = self._call(row, entry)
                ends = [self._branch(branch, entry) for branch in part.paths]
                joined = Inputs()
                given = joined.template((tuple(ends), {}), self._layout.title)
                entry = Entry(tuple(joined.nodes), given, None)
                row = [part.connection]
                continue
            apart = row and shard_of(row[-1]) is not shard_of(part)
            if apart or part.index in self._layout.starts:
                entry = self._call(row, entry)
                row = []
            row.append(part)
        return self._call(row, entry, last=last)

    def _branch(self, path: Path, entry: Entry) -> Node:
        """The end of one branch. A skip is no call: its value goes straight to where it is used.

        So its cotangent also comes first of all to where the value was made, as in plain torch.
        """
        skips = all(isinstance(part, Layer) and part.passes for part in path)
        if skips and entry.value is not None:
            return entry.value
        return self.path(path, entry).inputs[0]

    def _call(self, row: Sequence[Layer], entry: Entry, *, last: bool = False) -> Entry:
        """Make the call of layers in a row, if there are any; returns the next call's arguments."""
        if not row:
            return entry
        names = [layer.name or layer.kind for layer in row]
        title = names[0] if len(row) == 1 else f"{names[0]}..{names[-1]}"
        steps = tuple([(r.index, name, r.kind) for r, name in zip(row, names, strict=True)])
        layout = self._layout
        parameters = dict.fromkeys([n for layer in row for n in layout.trained_by(layer)])
        shard = layout.shard_of(row[0])
        return self.call(title, steps, shard, entry, parameters=tuple(parameters), last=last)

    def call(
        self,
        title: str,
        steps: tuple[LayerStep, ...],
        shard: Shard,
        entry: Entry,
        *,
        last: bool = False,
        **given: Any,
    ) -> Entry:
        """Make one call on a shard, with what else `Call` is given; the next call's arguments."""
        if self._settings is None:
            self._settings = settings_now().under_autocast(self._autocast)
        inputs, context = entry.inputs, None
        if self._extend is not None:
            steps, inputs, context = self._extend(steps, inputs, last)
        suffix = self._suffix
        if suffix:
            steps = tuple([(i, n if i == LOSS else n + suffix, kind) for i, n, kind in steps])
        call = Call(
            title=title,
            steps=steps,
            inputs=inputs,
            template=entry.template,
            shard=shard,
            mode=self._mode,
            worker=shard.worker,
            context=context,
            settings=self._settings,
            **given,
        )
        self.calls.append(call)
        return Entry((call,), _ONE_INPUT, call)


class Layout(ShardTasks):
    """The placement of a model's layers on workers, and the means to run something there.

    It makes the same calls for every batch, unless `is_traced`.

    Parameters
    ----------
    title
        The model's name, for messages and task keys.
    flat
        The model; of it only names and shapes are kept.
    workers
        The worker of each layer, an address.
    session
        The session of the client that the workers belong to.
    starts
        The layers that start a stage though the layer before may be on the same worker. Else a
        stage is layers in a row on one worker.

    Attributes
    ----------
    ref : ChainRef
        Identifies the chain; says which trainer or optimizer it has.
    path : Path
        The layers as a graph.
    devices : dict of str to str
        By worker the device that its layers are on, once they are there.
    layers : list of Layer
        In the order in which they run.
    tensors : dict of str to ParameterInfo
        Parameters and buffers, by the first name of each.
    trainable : list of str
        The names of the trainable parameters, in the model's order.
    takes : Signature or None
        The arguments that the model takes, where they are known.
    """

    is_traced = False
    takes_one_input = False

    def __init__(
        self,
        title: str,
        flat: Model,
        workers: Sequence[str],
        session: Session,
        starts: frozenset[int] = frozenset(),
    ) -> None:
        self.ref = ChainRef(title)
        self._shard_of = shards_of(self.ref, flat, workers)
        super().__init__(title, session, dict.fromkeys(self._shard_of))
        self.starts = starts
        self.layers = flat.layers
        self.tensors = flat.tensors
        self.path = flat.path
        self.takes = flat.takes
        self.devices: dict[str, str] = {}
        self.parametrized = is_parametrized(flat.modules)
        self._by_name = {layer.name: layer for layer in reversed(self.layers)}
        self.trainable = [
            name for name, i in self.tensors.items() if i.requires_grad and not i.is_buffer
        ]
        self._uses: list[list[str]] = [[] for _ in self.layers]  # trainable parameters, by layer
        for name in self.trainable:
            for alias in self.tensors[name].names:
                self._uses[self.owner(alias).index].append(name)

    def owner(self, name: str) -> Layer:
        """The layer that a parameter or buffer of this name is part of."""
        return owner_of(name, self._by_name)

    def shard_of(self, layer: Layer) -> Shard:
        """The shard that a layer is part of."""
        return self._shard_of[layer.index]

    def home(self, name: str) -> Shard:
        """The shard that owns the parameter or buffer of this name; see `Shard.home`.

        That of a tied parameter is the one with its first name; other shards have copies of it.
        """
        return self.shard_of(self.owner(name))

    def held_on(self, shard: Shard) -> list[str]:
        """The first names of the parameters and buffers that are on a shard, also of copies."""
        return [
            name
            for name, info in self.tensors.items()
            if any(self.shard_of(self.owner(n)) is shard for n in info.names)
        ]

    def at(self, shard: Shard) -> Layout:
        """The layout whose layers are on this shard: of a replica, if it is a replica's."""
        return self

    def parameters_on(self, shard: Shard) -> dict[str, tuple[int, str]]:
        """By its first name, where each parameter on a shard is: (index of layer, name in it)."""
        names: dict[str, tuple[int, str]] = {}
        for info in self.tensors.values():
            for name in info.names:
                layer = self.owner(name)
                if not info.is_buffer and self.shard_of(layer) is shard:
                    names.setdefault(info.name, (layer.index, local_name(name, layer)))
        return names

    def on_shards(self, shards: Mapping[Shard, Shard]) -> Layout:
        """The same layers on other shards, each in the place of one of these."""
        found = copy(self)
        found._shard_of = [shards[shard] for shard in self._shard_of]
        found.shards = tuple(shards[shard] for shard in self.shards)
        found.devices = {}
        return found

    @property
    def first(self) -> Shard:
        """The shard that takes the model's input."""
        return self.shard_of(self.layers[0])

    @property
    def last(self) -> Shard:
        """The shard that has the model's output."""
        return self.shard_of(self.layers[-1])

    @property
    def refs(self) -> tuple[ChainRef, ...]:
        """All chains whose layers these are."""
        return (self.ref,)

    @property
    def parts(self) -> Mapping[str, Layout]:
        """The layouts of several chains that are joined here, by name."""
        return {}

    @property
    def called_again(self) -> Sequence[str]:
        """Those of the parts that a batch passes more than once."""
        return ()

    @property
    def names(self) -> list[str]:
        """The names of all that runs, in order."""
        return [layer.name or layer.kind for layer in self.layers]

    def trained_by(self, layer: Layer) -> list[str]:
        """The trainable parameters that a layer uses, tied ones under their first name."""
        return self._uses[layer.index]

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
        """The calls of all layers; the last one returns the model's output.

        The layers of a stage are one call. The first layer takes `args` and `kwargs`:
        pytrees of tensors, thunks, nodes, Dask collections and plain values. `mode` is True to
        train, False to evaluate, None to leave the layers as they are. `extend` adds to each call
        what a training step needs. If only a part of the output is needed, `select` takes it of the
        output; a sequential model gives all of it. `draw` says what the model's own forward draws
        random numbers for, where that runs on the driver.
        """
        self.refuse_modes()
        walk = Walk(self, mode, autocast, extend)
        walk.path(self.path, entry_of(args, kwargs, self.title), last=True)
        return walk.calls

    def planned_calls(self, select: Select | None = None) -> list[Call]:
        """Calls as those of a training step, to make a plan of; they do not run."""
        return self.calls((Leaf(None, needs_grad=False),), {}, mode=True)

    def plan_by(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        autocast: Autocast,
        select: Select | None,
    ) -> None:
        """Make training steps for calls with such arguments, if no plan was made; see `calls`."""

    def may_end_at(self, shard: Shard) -> bool:
        """True if the model's output may be made there."""
        return shard is self.last

    def refuse_modes(self) -> None:
        """Raise TaskgradError in a mode of torch that would not reach the layers."""
        refuse_modes(self.title)
        if self.parametrized:
            refuse_cached(self.title)

    def refuse_averages(self, what: str) -> None:
        """Raise TaskgradError if averages of the weights are in their place when `what` is called.

        See `taskgrad.EMA`.
        """
        if any(ref.has_averages for ref in self.refs):
            raise TaskgradError(
                f"{what} was called in a block of EMA.applied, where the chain has the averages of "
                "its weights: call it after the block"
            )

    def device_memory(self) -> dict[str, dict[str, int]]:
        """By worker, if its layers are on a GPU, the bytes of its memory as in a `MemoryRow`."""
        shards = [s for s in self.shards if self.devices.get(s.worker, "cpu") != "cpu"]
        tasks = [self.task(shard, shard_ops.memory_of_device, {}) for shard in shards]
        found = zip(shards, self.results(tasks) if tasks else (), strict=True)
        return {shard.worker: sizes for shard, sizes in found if sizes}

    def deploy(
        self,
        flat: Model,
        device: str | Mapping[str, str] | None,
        deferred: DeferredInit,
        seed: int,
    ) -> None:
        """Send every shard to its worker, to that `device`, or the one of the worker.

        `deferred` says which values are not sent but made there, from streams fixed by `seed`.
        """
        init_plans, values = deferred
        copied = copied_names(self.shards)
        store_ids = self.session.store_ids([shard.worker for shard in self.shards])
        unsent = unsent_tensors(flat, init_plans)
        installs = []
        for shard in self.shards:
            here = [layer.index for layer in self.layers if self.shard_of(layer) is shard]
            packed = pack.pack({i: flat.modules[i] for i in here}, hooks=True)
            arguments = {
                "data": packed.data,
                "names": self.parameters_on(shard),
                "device": device.get(shard.worker) if isinstance(device, Mapping) else device,
                "store_id": store_ids[shard.worker],
                "init_plans": {i: init_plans[i] for i in here if i in init_plans},
                "seed": seed,
                "copied": copied.get(shard, []),
            }
            sent = [
                TensorSpec.of(t)
                if isinstance(t, torch.Tensor) and id(t) in unsent
                else values.get(id(t), t)
                for t in packed.laid_out()
            ]
            leaf = Leaf(sent, needs_grad=False)
            installs.append(
                ShardCall(shard, shard_ops.install, arguments, key=shard.token, after=[leaf])
            )
        self.run(installs)
        for call in installs:
            self.executor.hold(call.shard, call)
        if init_plans:
            self.copy_tied()
        places = self.results(installs)
        self.devices = {c.shard.worker: p for c, p in zip(installs, places, strict=True)}
