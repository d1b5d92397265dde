"""Where the layers of a chain are: shards, calls of the layers, tasks on the shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.registry import executor_of
from taskgrad.graph import pack
from taskgrad.graph.calls import Call, LayerStep, StepContext
from taskgrad.graph.deferred_init import InitPlan, TensorSpec, unsent_tensors
from taskgrad.graph.functions import template
from taskgrad.graph.layers import Branches, Layer, Model, Path, local_name, owner_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import Slot
from taskgrad.graph.sending import is_parametrized, refuse_cached
from taskgrad.graph.shards import ChainRef, Shard, ShardCall, copied_names, shards_of
from taskgrad.graph.torch_settings import TorchSettings, refuse_modes, settings_now
from taskgrad.thunk import Inputs, Thunk
from taskgrad.worker import loading, shard_ops

Autocast = tuple[tuple[str, torch.dtype], ...]
"""Regions of autocast, each (device type, dtype)."""

Extend = Callable[
    [tuple[LayerStep, ...], tuple[Node, ...], bool],
    tuple[tuple[LayerStep, ...], tuple[Node, ...], StepContext],
]
"""(steps, inputs, whether it is the last) of a call -> what a training step makes of them."""

# The arguments of a call whose one argument is the result of the call before it.
_ONE_INPUT = template(((Slot(0),), {}))


class _Entry(NamedTuple):
    """The arguments of the next call: nodes, and the template that they fill.

    `value` is the node that is its one argument, if it has one and that is a node.
    """

    inputs: tuple[Node, ...]
    template: bytes
    value: Node | None


class _Walk:
    """One pass over a model's layers, which makes their calls: those of a stage as one.

    All calls have the settings of torch that the first one is made with.
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

    def path(self, path: Path, entry: _Entry, *, last: bool = False) -> _Entry:
        """Make the calls of a path; if `last`, the last one returns the model's output."""
        shard_of = self._layout.shard_of
        row: list[Layer] = []
        for part in path:
            if isinstance(part, Branches):
                entry = self._call(row, entry)
                ends = [self._branch(branch, entry) for branch in part.paths]
                joined = Inputs()
                given = joined.template((tuple(ends), {}), self._layout.title)
                entry = _Entry(tuple(joined.nodes), given, None)
                row = [part.connection]
                continue
            apart = row and shard_of(row[-1]) is not shard_of(part)
            if apart or part.index in self._layout.starts:
                entry = self._call(row, entry)
                row = []
            row.append(part)
        return self._call(row, entry, last=last)

    def _branch(self, path: Path, entry: _Entry) -> Node:
        """The end of one branch. A skip is no call: its value goes straight to where it is used.

        So its cotangent also comes first of all to where the value was made, as in plain torch.
        """
        skips = all(isinstance(part, Layer) and part.passes for part in path)
        if skips and entry.value is not None:
            return entry.value
        return self.path(path, entry).inputs[0]

    def _call(self, row: Sequence[Layer], entry: _Entry, *, last: bool = False) -> _Entry:
        """Make the call of layers in a row, if there are any; returns the next call's arguments."""
        if not row:
            return entry
        names = [layer.name or layer.kind for layer in row]
        title = names[0] if len(row) == 1 else f"{names[0]}..{names[-1]}"
        if self._settings is None:
            self._settings = settings_now().under_autocast(self._autocast)
        steps = tuple([(r.index, name, r.kind) for r, name in zip(row, names, strict=True)])
        inputs, context = entry.inputs, None
        if self._extend is not None:
            steps, inputs, context = self._extend(steps, inputs, last)
        layout = self._layout
        shard = layout.shard_of(row[0])
        parameters = dict.fromkeys([n for layer in row for n in layout.trained_by(layer)])
        call = Call(
            title=title,
            steps=steps,
            inputs=inputs,
            template=entry.template,
            shard=shard,
            parameters=tuple(parameters),
            mode=self._mode,
            worker=shard.worker,
            context=context,
            settings=self._settings,
        )
        self.calls.append(call)
        return _Entry((call,), _ONE_INPUT, call)


class Layout:
    """The placement of a model's layers on workers, and the means to run something there.

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
    executor : Executor
        What runs tasks and calls.
    ref : ChainRef
        Identifies the chain; says which trainer or optimizer it has.
    shards : tuple of Shard
        What each worker holds: all layers of the chain there.
    layers : list of Layer
        In the order in which they run.
    tensors : dict of str to ParameterInfo
        Parameters and buffers, by the first name of each.
    trainable : list of str
        The names of the trainable parameters, in the model's order.
    """

    def __init__(
        self,
        title: str,
        flat: Model,
        workers: Sequence[str],
        session: Session,
        starts: frozenset[int] = frozenset(),
    ) -> None:
        self.title = title
        self.starts = starts
        self.session = session
        self.executor = executor_of(session)
        self.ref = ChainRef(title)
        self.layers = flat.layers
        self.tensors = flat.tensors
        self._shard_of = shards_of(self.ref, flat, workers)
        self.shards = tuple(dict.fromkeys(self._shard_of))
        self._path = flat.path
        self._parametrized = is_parametrized(flat.modules)
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
    ) -> list[Call]:
        """The calls of all layers; the last one returns the model's output.

        The layers of a stage are one call. The first layer takes `args` and `kwargs`:
        pytrees of tensors, thunks, nodes, Dask collections and plain values. `mode` is True to
        train, False to evaluate, None to leave the layers as they are. `extend` adds to each call
        what a training step needs.
        """
        self.refuse_modes()
        inputs = Inputs()
        alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor | Thunk | Node)
        if alone:
            inputs.slot(args[0])
            entry = _Entry(tuple(inputs.nodes), _ONE_INPUT, inputs.nodes[0])
        else:
            given = inputs.template((tuple(args), dict(kwargs)), self.title)
            entry = _Entry(tuple(inputs.nodes), given, None)
        walk = _Walk(self, mode, autocast, extend)
        walk.path(self._path, entry, last=True)
        return walk.calls

    def refuse_modes(self) -> None:
        """Raise TaskgradError in a mode of torch that would not reach the layers."""
        refuse_modes(self.title)
        if self._parametrized:
            refuse_cached(self.title)

    def refuse_averages(self, what: str) -> None:
        """Raise TaskgradError if averages of the weights are in their place when `what` is called.

        See `taskgrad.EMA`.
        """
        if self.ref.has_averages:
            raise TaskgradError(
                f"{what} was called in a block of EMA.applied, where the chain has the averages of "
                "its weights: call it after the block"
            )

    def task(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        after: Sequence[Node] = (),
        awaits: Sequence[Node] = (),
        name: str = "",
    ) -> ShardCall:
        """A task that calls a function of `taskgrad.worker` on a shard; it does not run yet.

        `arguments` are keyword arguments, plain data; the values of the nodes in `after` are the
        positional ones. The nodes in `awaits` run before. `name` is the task's name on the
        dashboard, by default the function's.
        """
        key = new_key(name or function.__name__, self.title)
        return ShardCall(shard, function, dict(arguments), key=key, after=after, awaits=awaits)

    def tasks(
        self, function: Callable[..., Any], *, awaits: Sequence[Node] = (), **arguments: Any
    ) -> list[ShardCall]:
        """The same task on every shard."""
        return [self.task(shard, function, arguments, awaits=awaits) for shard in self.shards]

    def run(self, tasks: Sequence[ShardCall]) -> None:
        """Run tasks side by side; returns when all are done."""
        self.executor.run(tasks)

    def results(self, tasks: Sequence[ShardCall]) -> list[Any]:
        """Run tasks side by side; returns their results."""
        self.executor.run(tasks)
        return self.executor.values(tasks)

    def deploy(
        self, flat: Model, device: str | None, init_plans: Mapping[int, InitPlan], seed: int
    ) -> dict[str, str]:
        """Send every shard to its worker; returns the device that each ended up on.

        `init_plans` say which values are not sent but made there, from streams fixed by `seed`.
        """
        copied = copied_names(self.shards)
        store_ids = self.session.store_ids([shard.worker for shard in self.shards])
        unsent = unsent_tensors(flat, init_plans)
        installs = []
        for shard in self.shards:
            here = [layer.index for layer in self.layers if self.shard_of(layer) is shard]
            names: dict[str, tuple[int, str]] = {}
            for info in flat.tensors.values():
                for name in info.names:
                    layer = self.owner(name)
                    if not info.is_buffer and self.shard_of(layer) is shard:
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
        self.run(installs)
        for call in installs:
            self.executor.hold(call.shard, call)
        if init_plans:
            self.copy_tied()
        places = self.results(installs)
        return {c.shard.worker: place for c, place in zip(installs, places, strict=True)}

    @contextlib.contextmanager
    def all_or_nothing(self, shards: Iterable[Shard]) -> Iterator[None]:
        """Restore the layers of these shards, and their optimizers, if the block raises.

        Each worker keeps copies of parameters and buffers until the block ends.
        """
        shards = list(shards)
        self.run([self.task(shard, loading.begin, {}) for shard in shards])
        try:
            yield
        except BaseException as error:
            try:
                self.run([self.task(shard, loading.undo, {}) for shard in shards])
            except TaskgradError as broken:
                error.add_note(f"What was loaded could not be taken back: {broken}")
            raise
        self.run([self.task(shard, loading.finish, {}) for shard in shards])

    def refreshes(self, given: Mapping[Shard, Node]) -> dict[Shard, ShardCall]:
        """Tasks that write new values into copies of tied parameters, by the shard of the copies.

        `given` has for a shard the node whose value is the new values of what lives there.
        """
        found = {}
        for shard in self.shards:
            after = [given[h] for h in dict.fromkeys(shard.homes.values()) if h in given]
            if after:
                awaits = [given[shard]] if shard in given else []
                found[shard] = self.task(
                    shard, shard_ops.set_parameters, {}, after=after, awaits=awaits, name="update"
                )
        return found

    def copy_tied(self) -> None:
        """Give copies of tied parameters the values that they have where they live."""
        gives = {
            shard: self.task(shard, shard_ops.give, {"names": names}, name="tied")
            for shard, names in copied_names(self.shards).items()
        }
        self.run(list(self.refreshes(gives).values()))
