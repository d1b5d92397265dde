"""GraphChain: a layered model as thunks, its layers resident on workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from distributed import Client
from torch import nn

from taskgrad.arguments import flag, whole
from taskgrad.cluster.session import WorkerSpec, session
from taskgrad.display.graph import call_graph, html
from taskgrad.display.table import MemoryRow, PlacementRow, Table
from taskgrad.executors.between_steps import between_steps
from taskgrad.executors.deploy import install
from taskgrad.executors.keeping import all_or_nothing
from taskgrad.executors.placing import check_device, place
from taskgrad.executors.registry import executor_of
from taskgrad.formats.weights import check_state, find_weights
from taskgrad.graph import pack
from taskgrad.graph.calls import Call, LayerStep, StepContext
from taskgrad.graph.deferred_init import from_factory, plan_init
from taskgrad.graph.layers import (
    Branches,
    Layer,
    ParameterInfo,
    Path,
    flatten_model,
    local_name,
    owner_of,
    rebuild_model,
)
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import Slot
from taskgrad.graph.reads import StoredGrad
from taskgrad.graph.sending import is_parametrized, reached, refuse_cached
from taskgrad.graph.shards import ChainRef, Shard, ShardCall, shards_of
from taskgrad.graph.templates import template
from taskgrad.graph.torch_settings import (
    TorchSettings,
    refuse_modes,
    refuse_module_hooks,
    settings_now,
)
from taskgrad.thunk import Inputs, Lazy, Thunk
from taskgrad.worker import keeping, shard_ops


class IncompatibleKeys(NamedTuple):
    """What `GraphChain.load_state_dict` with ``strict=False`` did not match, as in torch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


Autocast = tuple[tuple[str, torch.dtype], ...]
"""Regions of autocast, each (device type, dtype)."""

Extend = Callable[
    [tuple[LayerStep, ...], tuple[Node, ...], bool],
    tuple[tuple[LayerStep, ...], tuple[Node, ...], StepContext],
]
"""(steps, inputs, whether it is the last) of a call -> what a training step makes of them."""

# The arguments of a call whose one argument is what the call before it gave.
_ONE_INPUT = template(((Slot(0),), {}))


class _Entry(NamedTuple):
    """What the next call takes: nodes, and how they are its arguments.

    `value` is the node that is its one argument, if it has one and that is a node.
    """

    inputs: tuple[Node, ...]
    template: bytes
    value: Node | None


class _Walk:
    """One pass over a model's layers, which makes their calls: those in a row on one worker as one.

    All calls have the settings of torch that the first one is made with.
    """

    def __init__(
        self, chain: GraphChain, mode: bool | None, autocast: Autocast, extend: Extend | None
    ) -> None:
        self.calls: list[Call] = []
        self._chain = chain
        self._mode = mode
        self._autocast = autocast
        self._extend = extend
        self._settings: TorchSettings | None = None

    def path(self, path: Path, entry: _Entry, *, last: bool = False) -> _Entry:
        """Make the calls of a path; the `last` one gives the model's output."""
        shard_of = self._chain._shard_of
        row: list[Layer] = []
        for part in path:
            if isinstance(part, Branches):
                entry = self._call(row, entry)
                ends = [self._branch(branch, entry) for branch in part.paths]
                joined = Inputs()
                given = joined.template((tuple(ends), {}), self._chain._title)
                entry = _Entry(tuple(joined.nodes), given, None)
                row = [part.connection]
                continue
            if row and shard_of[row[-1].index] is not shard_of[part.index]:
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
        """Make the call of layers in a row, if there are any; what the next one takes."""
        if not row:
            return entry
        names = [layer.name or layer.kind for layer in row]
        title = names[0] if len(row) == 1 else f"{names[0]}..{names[-1]}"
        if self._settings is None:
            refuse_modes(title)
            self._settings = settings_now().under_autocast(self._autocast)
        steps = tuple([(r.index, name, r.kind) for r, name in zip(row, names, strict=True)])
        inputs, context = entry.inputs, None
        if self._extend is not None:
            steps, inputs, context = self._extend(steps, inputs, last)
        chain = self._chain
        shard = chain._shard_of[row[0].index]
        parameters = dict.fromkeys([n for layer in row for n in chain._trainable[layer.index]])
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


class GraphChain(Lazy):
    """A model whose layers live on workers; calling it makes a thunk.

    Parameters
    ----------
    model : nn.Module or callable
        An ``nn.Sequential`` (nested ones are flattened, names kept) with `Parallel` layers wherever
        a value branches; any other module is one layer. It is copied: the chain does not change it
        and keeps nothing of it on the driver but names and shapes; attributes of its parameters and
        hooks on their gradients go with them. Or a function that makes it,
        which is called under ``torch.device("meta")``: what is on the meta device gets its values
        on its worker, from ``weights`` or from the ``reset_parameters`` of each module.
    client : distributed.Client, optional
        By default the current client; with none, a local cluster is started.
    placement : None, "round_robin" or sequence, optional
        None cuts the layers into contiguous runs, one a worker, balanced by parameter and
        activation bytes. A sequence gives the worker (index, name or address) of each layer, in the
        order of ``chain.placement``.
    device : str, optional
        Torch device of the layers on each worker; by default the kind that the model is on. A bare
        ``"cuda"`` is the first that each worker sees.
    weights : path, optional
        Files that the workers read parameters and persistent buffers from: as `load_state_dict`
        takes them, on a filesystem that all of them share with the driver.
    seed : int
        Of the values that modules on the meta device are given. A module draws from a stream that
        is fixed by the seed and its name, wherever it is.

    Raises
    ------
    TypeError
        `model` is not an ``nn.Module``, or a layer cannot be pickled (the message names it).
    ValueError
        The model has no layers, or parameters that are uninitialized; or a module on the meta
        device has no ``reset_parameters`` and no weights.
    CheckpointError
        The weights are another model's, or cannot be read.
    PlacementError
        The placement has the wrong length or names a worker that is not there.
    ClusterMismatchError
        The workers lack torch or taskgrad, or have other versions.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)))
    >>> y = chain(torch.ones(4, 2))
    >>> y
    Thunk[2](Linear, (Thunk[1](Linear, (float32[4, 2],)),))
    >>> tg.collect(y).shape
    torch.Size([4, 1])
    >>> client.close()
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        client: Client | None = None,
        placement: Literal["round_robin"] | Sequence[WorkerSpec] | None = None,
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        seed = whole("seed", seed)
        device = None if device is None else check_device(device)
        module = from_factory(model)
        flat = flatten_model(module)
        stored = None if weights is None else find_weights(weights)
        init_plans = plan_init(flat, stored)
        self._title = type(module).__name__
        self._parametrized = is_parametrized(flat.modules)
        refuse_module_hooks(self._title)
        taken = reached(flat)
        self._session = session(client)
        self._executor = executor_of(self._session)
        workers = place(flat, taken, placement, self._session)
        self._path: Path = flat.path
        self._layers: list[Layer] = flat.layers
        self._tensors: dict[str, ParameterInfo] = flat.tensors
        self._skeleton = flat.skeleton
        # A layer that stands twice in the model, by the first place where it stands.
        first: dict[int, int] = {}
        self._same_as = [first.setdefault(id(m), i) for i, m in enumerate(flat.modules)]
        self._mode: bool | None = None
        self._ref = ChainRef(self._title)
        self._shard_of = shards_of(self._ref, flat, workers)
        self._shards: dict[str, Shard] = {shard.worker: shard for shard in self._shard_of}
        self._by_name = {layer.name: layer for layer in reversed(self._layers)}
        self._trainable = self._trainable_by_layer()
        if device is None:  # a model on a GPU here belongs on the workers' own GPUs
            kinds = {info.device.type for info in self._tensors.values()} - {"cpu", "meta"}
            device = next(iter(kinds), None)
        devices = install(flat, self._shard_of, device, init_plans, seed, self._session)
        sizes = self._sizes()
        self.placement = Table(
            PlacementRow,
            [
                PlacementRow(layer.name, layer.kind, w, devices[w], *sizes.get(layer.name, (0, 0)))
                for layer, w in zip(self._layers, workers, strict=True)
            ],
        )
        """Which layer is on which worker: rows that print as a table."""

    # -- construction ------------------------------------------------------------------------------

    def _sizes(self) -> dict[str, tuple[int, int]]:
        sizes: dict[str, tuple[int, int]] = {}
        for info in self._tensors.values():
            count, size = sizes.get(info.layer, (0, 0))
            elements = 0 if info.is_buffer else info.nbytes // max(1, info.dtype.itemsize)
            sizes[info.layer] = (count + elements, size + info.nbytes)
        return sizes

    # -- calling -----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Thunk:
        """A thunk of the model's output; nothing runs.

        The arguments are those of the first layer: pytrees of tensors, thunks, Dask collections and
        plain values.
        """
        return Thunk(self._calls(args, kwargs, mode=self._mode)[-1], self._session)

    def _calls(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: bool | None,
        autocast: Autocast = (),
        extend: Extend | None = None,
    ) -> list[Call]:
        """The calls of the model's layers on these arguments, in order; the last gives its output.

        Parameters
        ----------
        mode
            Of the layers: True to train, False to evaluate, None as they are.
        autocast
            Regions of autocast to run in, each (device type, dtype).
        extend
            What a training step adds to each call.
        """
        if self._parametrized:
            refuse_cached(self._title)
        inputs = Inputs()
        alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor | Thunk | Node)
        if alone:
            inputs.slot(args[0])
            entry = _Entry(tuple(inputs.nodes), _ONE_INPUT, inputs.nodes[0])
        else:
            given = inputs.template((tuple(args), dict(kwargs)), self._title)
            entry = _Entry(tuple(inputs.nodes), given, None)
        walk = _Walk(self, mode, autocast, extend)
        walk.path(self._path, entry, last=True)
        return walk.calls

    def _trainable_by_layer(self) -> list[list[str]]:
        """The trainable parameters that each layer uses, tied ones under their first name."""
        found: list[list[str]] = [[] for _ in self._layers]
        for info in self._tensors.values():
            if info.requires_grad and not info.is_buffer:
                for name in info.names:
                    found[owner_of(name, self._by_name).index].append(info.name)
        return found

    # -- state -------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> GraphChain:
        """Calls made from now on run in training mode (in evaluation mode with False)."""
        self._mode = flag("mode", mode)
        return self

    def eval(self) -> GraphChain:
        """Calls made from now on run in evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Drop the gradients on the workers; those of a trainer's steps when these are done."""
        with between_steps((), [self._ref]):
            self._on_shards(shard_ops.zero_grad)

    def grads(self) -> dict[str, Thunk]:
        """The accumulated gradient of each trainable parameter: thunks of tensors, or of None."""
        found = {}
        for name, info in self._tensors.items():
            if info.requires_grad and not info.is_buffer:
                found[name] = Thunk(StoredGrad(self._home(name), name), self._session)
        return found

    def named_parameters_info(self) -> Iterable[tuple[str, ParameterInfo]]:
        """(name, info) of each parameter, tied ones once, in the model's order."""
        return [(name, info) for name, info in self._tensors.items() if not info.is_buffer]

    def memory(self) -> Table[MemoryRow]:
        """Bytes that this chain holds on each worker now; a table.

        Columns are parameters, buffers, gradients, optimizer (its state) and tapes (what forwards
        keep for their backwards). Memory that several share counts once.
        """
        held = self._on_shards(shard_ops.memory)
        return Table(
            MemoryRow,
            [MemoryRow(s.worker, **h) for s, h in zip(self._shards.values(), held, strict=True)],
        )

    def state_dict(self) -> dict[str, Any]:
        """Parameters and persistent buffers by the model's own names, as copies on the driver.

        Waits for the steps of a trainer that are on their way.

        Raises
        ------
        LayerError, WorkerLostError
            Such a step failed, or a worker is gone.
        """
        with between_steps((), [self._ref]):
            states = self._on_shards(shard_ops.state)
        by_index = {i: state for part in states for i, state in part.items()}
        return {
            f"{layer.name}.{key}" if layer.name else key: value
            for layer in self._layers
            for key, value in by_index.get(layer.index, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Load parameters and buffers by the model's own names into the workers.

        Waits for the steps of a trainer that are on their way.

        Raises
        ------
        RuntimeError
            A shape differs, or with `strict` a key is missing or unexpected: nothing is loaded.
        LayerError
            A module raised, on any worker: nothing is loaded on all of them.
        """
        strict = flag("strict", strict)
        expected = {n: i for i in self._tensors.values() if i.persistent for n in i.names}
        check_state(state, {name: info.dtype for name, info in expected.items()})
        missing = [n for n in expected if n not in state]
        extra = [n for n in state if n not in expected and not n.endswith("_extra_state")]
        wrong = [
            f"{n}: the model has {list(expected[n].shape)}, the state has {list(state[n].shape)}"
            for n in expected
            if n in state and tuple(state[n].shape) != expected[n].shape
        ]
        if wrong or (strict and (missing or extra)):
            raise RuntimeError(
                f"the state does not fit this chain ({self._title}). "
                f"Missing: {missing or 'none'}. Unexpected: {extra or 'none'}. "
                f"Wrong shape: {wrong or 'none'}"
            )
        split: dict[Shard, dict[int, dict[str, Any]]] = {}
        for name, value in state.items():
            if name in extra:
                continue
            layer = owner_of(name, self._by_name)
            part = split.setdefault(self._shard_of[layer.index], {})
            part.setdefault(layer.index, {})[local_name(name, layer)] = value
        loads = [
            ShardCall(
                shard,
                keeping.load,
                {"names": {i: self._layers[i].name for i in states}},
                key=new_key("load", self._title),
                after=[Leaf(states, needs_grad=False)],
            )
            for shard, states in split.items()
        ]
        with between_steps((), [self._ref]), all_or_nothing(split, self._executor):
            self._executor.run(loads)
        return IncompatibleKeys(missing, extra)

    def to_module(self) -> nn.Module:
        """The user's own module again, with the weights, buffers and mode of now."""
        modules: dict[int, Any] = {}
        with between_steps((), [self._ref]):
            fetched = self._on_shards(shard_ops.fetch, mode=self._mode)
        for data, tensors in fetched:
            modules |= pack.unpack(data, tensors, own=True)
        layers = [modules[i] for i in self._same_as]
        model = rebuild_model(self._skeleton, layers, self._tensors.values())
        if self._mode is not None:
            model.train(self._mode)
        return model

    def _home(self, name: str) -> Shard:
        return self._shard_of[owner_of(name, self._by_name).index]

    def _on_shards(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run one function on every shard; returns what each gave."""
        calls = [
            ShardCall(shard, function, arguments, key=new_key(function.__name__, self._title))
            for shard in self._shards.values()
        ]
        self._executor.run(calls)
        return self._executor.values(calls)

    # -- printing ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        total = sum(row.parameters for row in self.placement)
        return (
            f"GraphChain({self._title}, {len(self)} layers, {total:,} parameters, "
            f"{len(self._shards)} workers)"
        )

    def _repr_html_(self) -> str:
        with torch.no_grad():
            graph = call_graph([self(None)._node])
        return html(repr(self), graph, self.placement._repr_html_())
