"""GraphChain: a layered model as thunks, its layers resident on workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from distributed import Client
from torch import nn

from taskgrad.arguments import flag, whole
from taskgrad.captured_layout import CapturedLayout
from taskgrad.cluster.session import WorkerSpec, session
from taskgrad.display.graph import CallGraph, call_graph, drawn, html
from taskgrad.display.layer_graph import layer_call_graph, to_networkx
from taskgrad.display.placement import placement_table
from taskgrad.display.table import MemoryRow, Table
from taskgrad.errors import TaskgradError
from taskgrad.executors.between_steps import between_steps
from taskgrad.executors.placing import Device, Placement, check_device, check_devices, place
from taskgrad.formats.weights import check_state, find_weights, path_of
from taskgrad.graph import pack
from taskgrad.graph.any_model import in_layers
from taskgrad.graph.constructing import construct
from taskgrad.graph.cut import Cut
from taskgrad.graph.deferred_init import plan_init
from taskgrad.graph.layers import ParameterInfo, local_name, rebuild_model
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, Sum
from taskgrad.graph.output_capturing import without_output_capturing
from taskgrad.graph.pullback import StoredGrad
from taskgrad.graph.sending import reached
from taskgrad.graph.shards import Shard
from taskgrad.graph.torch_settings import refuse_module_hooks
from taskgrad.graph.weight_names import match
from taskgrad.layout import Layout
from taskgrad.memory_table import memory_table
from taskgrad.pretrained import Pretrained, save, shard_size
from taskgrad.thunk import Lazy, Thunk
from taskgrad.tracing import current_tracer
from taskgrad.worker import loading, shard_ops

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure


class IncompatibleKeys(NamedTuple):
    """Keys that `GraphChain.load_state_dict` with ``strict=False`` did not match, as in torch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class GraphChain(Lazy):
    """A model whose layers live on workers; calling it makes a thunk.

    Parameters
    ----------
    model : nn.Module or callable
        An ``nn.Sequential`` (nested ones are flattened, names kept) with `Parallel` layers wherever
        a value branches; or any other module, which is cut into layers. What runs in which order
        is found by following its own forward on the driver, for each kind of call once: with
        tensors that have shapes, and no values but those computed of the inputs alone. The model is
        copied: the chain does not change it and keeps nothing of it on the driver but names and
        shapes; attributes of its parameters and hooks on their gradients go with them. Or a
        function that makes it, which is called under ``torch.device("meta")``: what is on the meta
        device gets its values on its worker, from ``weights``, or from the ``reset_parameters`` of
        each module or the ``_init_weights`` of a class of transformers. It is called again for the
        values that only constructors compute, such as rotary tables.
    client : distributed.Client, optional
        By default the current client; with none, a local cluster is started.
    placement : None, "round_robin", "v" or sequence, optional
        None cuts the layers into contiguous runs, one a worker, balanced by parameter and
        activation bytes; ``"v"`` into two a worker, there and back over the workers, as the
        schedule ``"zb_v"`` has it. A sequence gives the worker (index, name or address) of each
        layer, in the order of ``chain.placement``.
    stages_per_worker : int
        With ``placement=None``, how many of the runs each worker has: those of a worker are as many
        apart as there are workers, as the schedule ``"interleaved_1f1b"`` has it.
    device : str or dict, optional
        Torch device of the layers on each worker; by default the kind that the model is on. A bare
        ``"cuda"`` is the first that each worker sees. A dict gives the devices of some workers
        (index, name or address); on the others layers stay where the model has them.
    weights : path, optional
        Files that the workers read parameters and persistent buffers from: as `load_state_dict`
        takes them, or a folder that ``save_pretrained`` of transformers wrote, on a filesystem that
        all of them share with the driver. Values are cast to the model's own dtypes. A tied tensor
        may be there under any of its names. Adapters of peft are not read but initialized.
    seed : int
        The seed of the values of modules on the meta device. A module draws from a stream that is
        fixed by the seed and its name, on any worker.
    example_inputs : optional
        Arguments of the forward of a model that is not sequential, ``(args, kwargs)``, or one alone
        or keyword arguments as a dict. With these the forward is followed at once: layers are in
        the order in which they run, and are balanced by what they keep for the backward; and what
        cannot be followed stays in one layer, with a warning that says why.
    cut : int, str or sequence of str, optional
        How a model is cut: to modules at this depth, or to the modules of these names or patterns
        (``"encoder.layers.*"``) and those beside them. By default to the items of ``ModuleList``
        and ``Sequential`` and the modules beside these lists, further where one has more than a
        worker's share of the bytes.
    keep_together : str or sequence of str, optional
        Names or patterns of modules that stay in one layer; ``""`` is the whole model.

    Raises
    ------
    TypeError
        `model` is not an ``nn.Module``, or a layer cannot be pickled (the message names it); or its
        forward does not take `example_inputs`.
    ValueError
        The model has no layers, or parameters that are uninitialized; or `cut` or `keep_together`
        match no module; or a module on the meta
        device has no ``reset_parameters`` and no weights, nor a constructor that computes them.
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
        placement: Placement = None,
        stages_per_worker: int = 1,
        device: Device | Mapping[WorkerSpec, Device] | None = None,
        weights: str | os.PathLike[str] | None = None,
        seed: int = 0,
        example_inputs: Any = None,
        cut: Cut = None,
        keep_together: str | Sequence[str] | None = None,
    ) -> None:
        seed = whole("seed", seed)
        stages_per_worker = whole("stages_per_worker", stages_per_worker, least=1)
        if not isinstance(device, Mapping | None):
            check_device(device)
        constructed = construct(model, seed)
        module = constructed.module
        title = type(module).__name__
        refuse_module_hooks(title)
        owner = session(client)
        devices = check_devices(device, owner)
        with without_output_capturing(module):
            workers = len(owner.workers()) * stages_per_worker
            layered = in_layers(module, example_inputs, cut, keep_together, workers)
            flat, capture = layered.flat, layered.capture
            stored = None if weights is None else match(module, flat, find_weights(weights))
            deferred = plan_init(module, flat, stored, constructed.constructed)
            taken = reached(flat)
            placed = place(flat, taken, placement, stages_per_worker, owner)
            made = title, flat, placed.workers, owner, placed.starts
            self.layout = (
                Layout(*made)
                if capture is None
                else CapturedLayout(*made, capture, layered.example)
            )
            """The layers' placement, and the means to run something there; for taskgrad itself."""
            self._skeleton = flat.skeleton
            self._pretrained = Pretrained.of(module)
            # A layer that occurs twice in the model, by its first occurrence.
            first: dict[int, int] = {}
            self._same_as = [first.setdefault(id(m), i) for i, m in enumerate(flat.modules)]
            self._mode: bool | None = None
            if devices is None:  # a model on a GPU here belongs on the workers' own GPUs
                kinds = {info.device.type for info in flat.tensors.values()} - {"cpu", "meta"}
                devices = next(iter(kinds), None)
            self.layout.deploy(flat, devices, deferred, seed)
        there = self.layout.devices
        self.placement = placement_table(flat, placed.workers, there, owner.names, placed.costs)
        """The worker of each layer, and what the layer takes: rows that print as a table."""

    def __call__(self, *args: Any, **kwargs: Any) -> Thunk:
        """A thunk of the model's output; nothing runs.

        The arguments are those of the first layer, or of the model's forward: pytrees of tensors,
        thunks, Dask collections and plain values. A forward that is followed takes no thunks or
        collections: it may ask for values of its inputs.

        Raises
        ------
        TaskgradError
            The model's forward cannot be followed; the message names the line, and what would help.
        """
        tracer = current_tracer()
        if tracer is not None:
            recorded: Thunk = tracer.call(self.layout, args, kwargs)
            return recorded
        output = self.layout.calls(args, kwargs, mode=self._mode)[-1]
        return Thunk(output, self.layout.session)

    def graph(self) -> nx.MultiDiGraph:
        """The graph that the model's forward was followed into, of the newest call or the example.

        Its nodes are layers, functions between them and parameters that are used directly; its
        edges are the values that go from one to another. Both have attributes, of which
        `taskgrad.display.layer_graph.to_networkx` has the list.

        Raises
        ------
        TaskgradError
            The forward was not followed: it was not called yet, or its model is a Sequential.
        ImportError
            There is no networkx, which the extra viz has.
        """
        layout = self.layout
        if not isinstance(layout, CapturedLayout):
            raise TaskgradError(
                f"the forward of {layout.title} was not followed, as its layers are the graph: "
                "draw() shows them"
            )
        graph, stages = layout.graph()
        return to_networkx(graph, layout.layers, stages)

    def draw(self) -> Figure:
        """A picture of the model's graph, from left to right, with a colour for each worker.

        Returns a ``matplotlib.figure.Figure``: notebooks show it, ``savefig`` writes it to a file.

        Raises
        ------
        TaskgradError
            There is no graph yet; see `graph`.
        ImportError
            There is no networkx or matplotlib, which the extra viz has.
        """
        return drawn(self._drawing(), self.layout.session.names)

    def _drawing(self) -> CallGraph:
        if isinstance(self.layout, CapturedLayout):
            return layer_call_graph(*self.layout.graph())
        with torch.no_grad():
            return call_graph([self(None)._node])

    def train(self, mode: bool = True) -> GraphChain:
        """Calls made from now on run in training mode (in evaluation mode with False)."""
        self._mode = flag("mode", mode)
        return self

    def eval(self) -> GraphChain:
        """Calls made from now on run in evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Drop the gradients on the workers; those of a trainer's steps when these are done."""
        layout = self.layout
        with between_steps((), [layout.ref]):
            shards = [*layout.shards, *layout.ref.replicas]
            layout.run([layout.task(shard, shard_ops.zero_grad, {}) for shard in shards])

    def grads(self) -> dict[str, Thunk]:
        """The accumulated gradient of each trainable parameter: thunks of tensors, or of None.

        Of a trainer with replicas they are what it has summed, wherever that is, added to what a
        backward of the chain itself has left.
        """
        layout = self.layout
        places = {name: [layout.home(name)] for name in layout.trainable}
        for name, home in {item for s in layout.ref.replicas for item in s.homes.items()}:
            if home.worker != places[name][0].worker:
                places[name].append(home)

        def grad(name: str) -> Node:
            stored = [StoredGrad(shard, name) for shard in places[name]]
            return Sum(stored, name, stored[0].worker) if len(stored) > 1 else stored[0]

        return {name: Thunk(grad(name), layout.session) for name in places}

    def named_parameters_info(self) -> Iterable[tuple[str, ParameterInfo]]:
        """(name, info) of each parameter, tied ones once, in the model's order."""
        tensors = self.layout.tensors.items()
        return [(name, info) for name, info in tensors if not info.is_buffer]

    def memory(self) -> Table[MemoryRow]:
        """Bytes that this chain holds on each worker now; a table.

        Columns are parameters, buffers, gradients, optimizer (its state, and averages of weights)
        and tapes (what forwards keep for their backwards). Memory that several share counts once.
        The replicas of a trainer are counted, too. Where layers are on a GPU there are two more
        columns: device_used, the bytes in use there by all processes, and device_total.
        """
        return memory_table(self.layout, (*self.layout.shards, *self.layout.ref.replicas))

    def state_dict(self) -> dict[str, Any]:
        """Parameters and persistent buffers by the model's own names, as copies on the driver.

        Waits for the steps of a trainer that are on their way.

        Raises
        ------
        LayerError, WorkerLostError
            Such a step failed, or a worker is gone.
        """
        with between_steps((), [self.layout.ref]):
            states = self.layout.results(self.layout.tasks(shard_ops.state))
        by_index = {i: state for part in states for i, state in part.items()}
        return {
            f"{layer.name}.{key}" if layer.name else key: value
            for layer in self.layout.layers
            for key, value in by_index.get(layer.index, {}).items()
        }

    def save_pretrained(
        self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
    ) -> None:
        """Write the weights as a folder that ``from_pretrained`` of transformers reads.

        The workers write their own layers' weights, under the names that the model's state_dict
        has; of tied ones those that transformers has in its files. The folder also gets
        ``config.json`` and, if the model has one, ``generation_config.json``. If writing fails it
        keeps the weights that it had. Waits for the steps of a trainer that are on their way.

        Parameters
        ----------
        folder : path
            On a filesystem that all workers share with the driver; it is made if it is not there.
        max_shard_size : int or str
            The most bytes of weights in one file, unless it has a single tensor: a number, or a
            text such as ``"500MB"``.

        Raises
        ------
        TypeError
            The model is not one of transformers, or has adapters of peft's.
        CheckpointError
            The folder cannot be written.
        """
        if self._pretrained is None:
            raise TypeError(
                "save_pretrained is for models of transformers, which have a config, without "
                f"adapters; this is a {self.layout.title}. Trainer.save writes its weights, too, "
                "state_dict() returns them, and to_module() the model with methods of its own"
            )
        path, most = path_of(folder), shard_size(max_shard_size)
        with between_steps((), [self.layout.ref]):
            save(self.layout, self._pretrained, path, most)

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
        self.layout.refuse_averages("load_state_dict")
        expected = {n: i for i in self.layout.tensors.values() if i.persistent for n in i.names}
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
                f"the state does not fit this chain ({self.layout.title}). "
                f"Missing: {missing or 'none'}. Unexpected: {extra or 'none'}. "
                f"Wrong shape: {wrong or 'none'}"
            )
        layout = self.layout
        split: dict[Shard, dict[int, dict[str, Any]]] = {}
        for name, value in state.items():
            if name in extra:
                continue
            layer = layout.owner(name)
            part = split.setdefault(layout.shard_of(layer), {})
            part.setdefault(layer.index, {})[local_name(name, layer)] = value
        for replica in layout.ref.replicas:  # the one on the same worker has the same modules
            if replica.replica_of in split and replica.worker != replica.replica_of.worker:
                split[replica] = split[replica.replica_of]
        loads = [
            layout.task(
                shard,
                loading.load,
                {"names": {i: layout.layers[i].name for i in states}},
                after=[Leaf(states, needs_grad=False)],
            )
            for shard, states in split.items()
        ]
        with between_steps((), [layout.ref]), layout.all_or_nothing(split):
            layout.run(loads)
        return IncompatibleKeys(missing, extra)

    def to_module(self) -> nn.Module:
        """The user's own module again, with the weights, buffers and mode of now."""
        modules: dict[int, Any] = {}
        with between_steps((), [self.layout.ref]):
            fetched = self.layout.results(self.layout.tasks(shard_ops.fetch, mode=self._mode))
        for data, tensors in fetched:
            modules |= pack.unpack(data, tensors, own=True)
        layers = [modules[i] for i in self._same_as]
        model = rebuild_model(self._skeleton, layers, self.layout.tensors.values())
        if self._mode is not None:
            model.train(self._mode)
        return model

    def __len__(self) -> int:
        return len(self.layout.layers)

    def __repr__(self) -> str:
        total = sum(row.parameters for row in self.placement)
        return (
            f"GraphChain({self.layout.title}, {len(self)} layers, {total:,} parameters, "
            f"{len(self.layout.shards)} workers)"
        )

    def _repr_html_(self) -> str:
        try:
            graph = self._drawing()
        except TaskgradError:  # there is none yet
            graph = CallGraph({}, [])
        names = self.layout.session.names
        return html(repr(self), graph, names, self.placement._repr_html_())
