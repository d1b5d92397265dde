"""A shard's part of a checkpoint: written to files where the shard lives, and read back there.

A shard writes two kinds of files: weights under the model's own names, which any safetensors reader
can load, and the tensors that only training needs. Everything that is not a tensor is returned to
the driver as JSON and stored in the checkpoint's index.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from taskgrad.errors import CheckpointError
from taskgrad.formats.encoding import decode, encode
from taskgrad.formats.weights import about, compare, contents, opened
from taskgrad.worker import averaging
from taskgrad.worker.failures import NOTHING_LOADED, layer_errors
from taskgrad.worker.offload import in_rows
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.store import Store
from taskgrad.worker.training import training_of
from taskgrad.worker.training_state import Scaler

EXTRA = "_extra_state"  # as torch names it in a state_dict

# The most bytes of tensors in one file, unless it has a single tensor.
_FILE = 256 << 20

_Read = Callable[[str], torch.Tensor]


class Place(NamedTuple):
    """A buffer on a shard: its layer, its name in the layer, and if a state_dict has it."""

    layer: int
    name: str
    persistent: bool


def save(
    store: Store,
    token: str,
    *,
    folder: str,
    suffix: str,
    parameters: list[str],
    buffers: Mapping[str, Place],
    layers: Mapping[int, str],
) -> dict[str, Any]:
    """Write the shard's tensors to files named with `suffix`; return the rest, and the files.

    `parameters` and `buffers` are those whose first names are here, `layers` the names of all
    layers. Nothing that is there is changed.

    Raises CheckpointError if the worker does not see the folder, cannot write to it, or holds what
    cannot be written.
    """
    with store.locked(token) as shard:
        training = training_of(shard)
        weights: dict[str, torch.Tensor] = {name: shard.parameters[name] for name in parameters}
        rest: dict[str, torch.Tensor] = {}
        for name, place in buffers.items():
            tensor = shard.layers[place.layer].get_buffer(place.name)
            if place.persistent:
                weights[name] = tensor
            else:
                rest[f"buffer/{name}"] = tensor
        for name in training.names:
            grad = shard.parameters[name].grad
            if grad is not None:
                rest[f"gradient/{name}"] = grad
        averaging.average(shard)
        if training.averages is not None:
            rest |= {f"average/{n}": value for n, value in training.averages.values.items()}
        scheduler = training.scheduler
        found = {
            "step": training.done,
            "optimizer": _optimizer(shard, rest, suffix),
            "scheduler": None
            if scheduler is None
            else encode(scheduler.state_dict(), f"scheduler/{suffix}", rest),
            "scaler": training.scaler and asdict(training.scaler),
            "averaged": training.averages and training.averages.updates,
            "extra": {
                name: encode(module.get_extra_state(), f"extra/{name}", rest)
                for name, module in _with_extra_state(shard, layers).items()
            },
        }
        check_folder(store, folder)
        files = {}
        for kind, tensors in (("model", weights), ("training", rest)):
            for i, names in enumerate(in_rows({n: t.nbytes for n, t in tensors.items()}, _FILE), 1):
                file = f"{kind}-{suffix}-{i:03d}.safetensors"
                part = {name: tensors[name] for name in names}
                files[file] = write(f"worker {store.worker}", Path(folder) / file, part)
                if training.spilled is not None:
                    training.spilled.leave_memory()
        return {**found, "files": files}


def save_weights(
    store: Store,
    token: str,
    *,
    folder: str,
    files: Mapping[str, Mapping[str, str]],
    buffers: Mapping[str, Place],
) -> dict[str, Any]:
    """Write weights of the shard to these files; return a description of their contents.

    `files` has the first names of a file's tensors, by the names that they get there; `buffers` are
    the places of those that are no parameters.

    Raises CheckpointError as `save` does.
    """
    with store.locked(token) as shard:
        check_folder(store, folder)
        training = shard.trains.training
        spilled = None if training is None else training.spilled
        done = {}
        for file, names in files.items():
            part = {
                name: shard.layers[buffers[first].layer].get_buffer(buffers[first].name)
                if first in buffers
                else shard.parameters[first]
                for name, first in names.items()
            }
            done[file] = write(f"worker {store.worker}", Path(folder) / file, part)
            if spilled is not None:
                spilled.leave_memory()
        return done


def check_folder(store: Store, folder: str) -> None:
    """Raise CheckpointError unless this worker sees the folder."""
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"worker {store.worker} does not see the folder {folder}, which the driver made: "
            "a checkpoint goes to a filesystem that the driver and all workers share"
        )


def _optimizer(
    shard: ResidentShard, tensors: dict[str, torch.Tensor], suffix: str
) -> dict[str, Any] | None:
    """Groups with their options of now, and each parameter's state, by parameters' names."""
    optimizer = shard.optimizer
    if optimizer is None:
        return None
    names = {id(p): name for name, p in shard.parameters.items()}
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k != "params"}
        options.pop("param_names", None)  # the user's own names, which a fresh optimizer has too
        members = [names[id(p)] for p in group["params"]]
        encoded = encode(options, f"group/{suffix}/{i}", tensors)
        groups.append({"parameters": members, "options": encoded})
    state = {
        names[id(p)]: encode(dict(kept), f"optimizer/{names[id(p)]}", tensors)
        for p, kept in optimizer.state.items()
    }
    return {"class": type(optimizer).__qualname__, "groups": groups, "state": state}


def _with_extra_state(shard: ResidentShard, layers: Mapping[int, str]) -> dict[str, nn.Module]:
    """Modules that have a ``get_extra_state``, by the name of its value in a state_dict."""
    return {
        ".".join(filter(None, (layers[index], inner, EXTRA))): part
        for index, module in shard.modules.items()
        for inner, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def write(who: str, file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write one file and sync it to disk; return a description of its contents.

    Raises CheckpointError, which says who could not.
    """
    values = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{name!r} is {tensor.layout}, which safetensors cannot hold")
        value = tensor.detach().cpu().contiguous()
        # Safetensors takes no memory that other tensors share.
        own = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        values[name] = value if own else value.clone()
    try:
        file.touch()
        mode = file.stat().st_mode
        written = {name: about(value) for name, value in values.items()}
        save_file(values, file, metadata=contents(written))
        file.chmod(mode)  # safetensors makes it readable by the worker's user only
        with file.open("rb") as done:
            os.fsync(done.fileno())
            size = os.fstat(done.fileno()).st_size
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{who} could not write {file}: {type(error).__name__}: {error}"
        ) from error
    return {"bytes": size, "tensors": written}


def check(store: Store, token: str, *, folder: str, files: Mapping[str, Any]) -> None:
    """Read these tensors and compare their checksums; nothing is changed.

    Raises CheckpointError if the worker does not see a file, or one is damaged.
    """
    for file, written in files.items():
        path = Path(folder) / file
        check_file(path, written, f"worker {store.worker}")
        with opened(path) as handle:
            for name, about_it in written["tensors"].items():
                compare(handle.get_tensor(name), about_it, name, path)


def check_file(path: Path, written: Mapping[str, Any], who: str) -> None:
    """Raise CheckpointError, which says who does not see it, unless a file is as it was written."""
    if not path.is_file():
        raise CheckpointError(
            f"{who} does not see {path}: a checkpoint must be on a filesystem that the driver and "
            "all workers share"
        )
    size = path.stat().st_size
    if size != written["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes and had {written['bytes']} when it was written: it was cut "
            "short or written over"
        )


def load(
    store: Store,
    token: str,
    *,
    folder: str,
    files: Mapping[str, Any],
    buffers: Mapping[str, Place],
    layers: Mapping[int, str],
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    scheduler: Any,
    scaler: Mapping[str, Any] | None,
    extra: Mapping[str, Any],
    averaged: int,
    step: int,
) -> None:
    """Put a checkpoint into the shard, whose optimizer is new.

    `files` names the tensors that the shard needs. `state` and `options` are each parameter's
    optimizer state and the options of the group that it was in. `averaged` is the number of updates
    of the averages among the tensors.

    Raises CheckpointError if parameters are in other groups of the optimizer than they were when it
    was saved.
    """
    with store.locked(token) as shard, torch.no_grad(), ExitStack() as stack:
        training = training_of(shard)
        homes = {name: file for file, held in files.items() for name in held["tensors"]}
        handles = {file: stack.enter_context(opened(Path(folder) / file)) for file in files}

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = handles[homes[name]].get_tensor(name)
            return tensor

        for name in homes:
            _put(shard, buffers, name, read)
        if shard.optimizer is not None:
            _load_optimizer(shard, shard.optimizer, state, options, read)
        if training.scheduler is not None:
            _load_scheduler(training.scheduler, decode(scheduler, read))
        training.scaler = None if scaler is None else Scaler(**scaler)
        for name, module in _with_extra_state(shard, layers).items():
            what = f"set_extra_state of {name.removesuffix(EXTRA).rstrip('.')!r}"
            with layer_errors(what, name, store.worker, NOTHING_LOADED):
                module.set_extra_state(decode(extra[name], read))
        if training.averages is not None:
            training.averages.updates = averaged
        training.done = step


def _put(shard: ResidentShard, buffers: Mapping[str, Place], name: str, read: _Read) -> None:
    """Read a parameter, its gradient or average, or a buffer, if this is the name of one."""
    kind, _, rest = name.partition("/")
    if name in shard.parameters:
        shard.parameters[name].copy_(read(name))
    elif kind == "gradient" and rest in shard.parameters:
        parameter = shard.parameters[rest]
        parameter.grad = torch.empty_like(parameter).copy_(read(name))
    elif kind == "average" and rest in shard.parameters:
        training = training_of(shard)
        if training.averages is not None:
            part = {rest: torch.empty_like(shard.parameters[rest]).copy_(read(name))}
            if training.spilled is not None:
                training.spilled.put_away(part)
            training.averages.values |= part
    elif name in buffers or (kind == "buffer" and rest in buffers):
        place = buffers[name if name in buffers else rest]
        shard.layers[place.layer].get_buffer(place.name).copy_(read(name))


def _load_optimizer(
    shard: ResidentShard,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    read: _Read,
) -> None:
    spilled = training_of(shard).spilled
    names = {id(p): name for name, p in shard.parameters.items()}
    comparable = {n: decode(o, lambda key: read(key).tolist()) for n, o in options.items()}
    for group in optimizer.param_groups:
        members = [names[id(p)] for p in group["params"]]
        for name in members[1:]:
            if comparable[name] != comparable[members[0]]:
                raise CheckpointError(
                    f"parameters {members[0]!r} and {name!r} are in one group of the optimizer, "
                    "and were in groups with other options in the checkpoint: give the optimizer "
                    "and param_groups that it was saved with"
                )
        if members:
            group.update(decode(options[members[0]], read))
        steps_there = group.get("capturable") or group.get("fused")
        for parameter, name in zip(group["params"], members, strict=True):
            if name in state:
                values: dict[str, Any] = decode(state[name], read)
                optimizer.state[parameter] = {
                    # As in torch, a count of steps stays on the host.
                    key: _like(value, parameter)
                    if isinstance(value, torch.Tensor) and (key != "step" or steps_there)
                    else value
                    for key, value in values.items()
                }
                if spilled is not None:
                    spilled.put_away(optimizer.state[parameter])


def _load_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    ours, theirs = (
        len(s.get("_last_lr", s.get("base_lrs", ()))) for s in (scheduler.state_dict(), state)
    )
    if ours != theirs:
        raise CheckpointError(
            f"the optimizer has {ours} groups of parameters on this shard, and the scheduler's "
            f"state is of {theirs}: restore the checkpoint with its layers placed as they were"
        )
    scheduler.load_state_dict(state)


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A value as what belongs to a parameter: on its device, in its order in memory."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
