"""Run layers of a stage, or one function, and leave a tape."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.errors import LayerError
from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, carries_gradient, describe, flatten, map_leaves
from taskgrad.worker.store import ResidentStage, Store, Tape, buffers_key


@dataclass(frozen=True)
class Forward:
    """One forward task. Fields are those of `taskgrad.graph.nodes.Call`; `token` is its key.

    `needs_grad` says for each input slot whether somebody upstream takes a gradient. `buffers` are
    the slots of a function's buffers if their new values shall be left for `ReadBuffers`.
    """

    token: str
    title: str
    steps: tuple[tuple[int, str, str], ...]
    stage: str | None
    function: bytes
    tensor_slots: tuple[int, ...]
    template: bytes
    mode: bool | None
    autocast: tuple[tuple[str, torch.dtype], ...]
    taped: bool
    needs_grad: tuple[bool, ...]
    buffers: tuple[int, ...] = ()

    def run(self, store: Store, *values: Any) -> Any:
        """The output, detached; the tape, if any, is in the store under `token`.

        If it is there already the output is the same again. Layers run anew might give another one
        (dropout), and the tape would not fit what others have made of the first.
        """
        stage = store.stage(self.stage) if self.stage is not None else None
        with stage.lock if stage else contextlib.nullcontext():
            tape = store.get(self.token)
            if tape is None:
                return self._run(store, stage, values)
            return self._give_all(stage, tape.outputs, tape.output_structure)

    def _run(self, store: Store, stage: ResidentStage | None, values: tuple[Any, ...]) -> Any:
        device = stage.device if stage else None
        takes: list[list[torch.Tensor | None]] = []
        structures: list[Structure] = []
        fed: list[Any] = []
        with torch.set_grad_enabled(self.taped):
            for value, wanted in zip(values, self.needs_grad, strict=True):
                leaves, structure = flatten(value)
                taken, given = _feed(leaves, self.taped and wanted, device)
                takes.append(taken)
                structures.append(structure)
                fed.append(structure.build(given))
            if stage is not None:
                _set_mode(stage, self.mode)
            with contextlib.ExitStack() as regions:
                for kind, dtype in self.autocast:
                    regions.enter_context(torch.autocast(kind, dtype))
                output = self._call(store, stage, fed)
        if self.buffers:
            # By value: batch norm writes its statistics without counting a version.
            changed = [
                None if torch.equal(fed[i], values[i].to(fed[i].device)) else fed[i]
                for i in self.buffers
            ]
            store.put(buffers_key(self.token), changed)
        leaves, structure = flatten(output)
        if self.taped:
            tape = Tape(
                self.title,
                takes,
                structures,
                leaves,
                structure,
                _trainable(stage, self.steps),
                stage,
            )
            store.put(self.token, tape)
        return self._give_all(stage, leaves, structure)

    def _give_all(
        self, stage: ResidentStage | None, leaves: list[Any], structure: Structure
    ) -> Any:
        owned = _storages(stage, self.steps) if stage else set()
        return structure.build([_give(leaf, owned) for leaf in leaves])

    def _call(self, store: Store, stage: ResidentStage | None, fed: list[Any]) -> Any:
        template = pickle.loads(self.template)
        args, kwargs = map_leaves(lambda x: fed[x.index] if isinstance(x, Slot) else x, template)
        for index, name, kind in self.steps:
            if stage is not None:
                fn = stage.layers[index]
            else:
                fn = pack.unpack(self.function, [fed[i] for i in self.tensor_slots], own=False)
            before = (args, kwargs)
            try:
                value = fn(*args, **kwargs)
            except Exception as error:
                raise _layer_error(error, store.address, name, kind, before) from error
            args, kwargs = (value,), {}
        return args[0]


def _feed(
    leaves: list[Any], wanted: bool, device: torch.device | None
) -> tuple[list[torch.Tensor | None], list[Any]]:
    """For each leaf: the autograd leaf that will take its gradient, and what the layer gets.

    The layer gets a copy. A received tensor is Dask's memory, which other tasks read and the
    network may still be sending: an in-place layer must not write there.
    """
    taken: list[torch.Tensor | None] = []
    given: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            taken.append(None)
            given.append(leaf)
            continue
        start = leaf.detach()
        if wanted and carries_gradient(leaf):
            start = start.requires_grad_()
            taken.append(start)
        else:
            taken.append(None)
        moved = start.to(device) if device is not None else start
        given.append(moved.clone() if moved is start else moved)
    return taken, given


def _give(leaf: Any, owned: set[int]) -> Any:
    """An output leaf as a task's result: no autograd graph, no memory that a later step writes."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.detach()
    if leaf.device.type not in ("cpu", "meta"):
        return leaf.cpu()
    if owned and leaf.layout is torch.strided and leaf.untyped_storage().data_ptr() in owned:
        return leaf.clone()
    return leaf


def _modules(
    stage: ResidentStage | None, steps: tuple[tuple[int, str, str], ...]
) -> list[nn.Module]:
    if stage is None:
        return []
    layers = [stage.layers[index] for index, _, _ in steps]
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def _storages(stage: ResidentStage, steps: tuple[tuple[int, str, str], ...]) -> set[int]:
    found = set()
    for module in _modules(stage, steps):
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.layout is torch.strided:
                found.add(tensor.untyped_storage().data_ptr())
    return found - {0}


def _trainable(
    stage: ResidentStage | None, steps: tuple[tuple[int, str, str], ...]
) -> dict[str, nn.Parameter]:
    if stage is None:
        return {}
    used = {id(p) for module in _modules(stage, steps) for p in module.parameters()}
    return {n: p for n, p in stage.parameters.items() if id(p) in used and p.requires_grad}


def _set_mode(stage: ResidentStage, mode: bool | None) -> None:
    """Put the whole stage in training or evaluation mode, if it is not yet in it."""
    if mode is None or mode is stage.mode:
        return
    for layer in stage.layers.values():
        if isinstance(layer, nn.Module):
            layer.train(mode)
    stage.mode = mode


def _layer_error(
    error: Exception, address: str, name: str, kind: str, given: tuple[Any, Any]
) -> LayerError:
    args, kwargs = given
    shown = ", ".join([*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items())])
    # The frames below ours: the layer's own.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = "".join(traceback.format_list(frames))[-4000:]  # Dask cuts long messages in its own way
    return LayerError(
        f"layer {name!r} ({kind}) on worker {address} raised {type(error).__name__}: {error}\n"
        f"It was given {shown}. Check the layer before it, or the input.\n"
        f"The layer's own traceback:\n{own}{type(error).__name__}: {error}",
        name,
        address,
        error,
    )
