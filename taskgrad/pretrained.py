"""Write a chain's weights as a folder that transformers reads, from where they are.

Each worker writes the files of its own layers. They lie in a folder of their own inside the one
that was asked for, until all are on the disk; then the index names them there, and again once they
have their final names. So at any moment the folder has the old weights or the new ones, complete.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from taskgrad.arguments import shown
from taskgrad.errors import CheckpointError
from taskgrad.formats.files import check_visible, sync_folder, write_json
from taskgrad.formats.weights import SINGLE, WEIGHTS_INDEX, new_weights_index
from taskgrad.graph.layers import ParameterInfo, local_name
from taskgrad.layout import Layout
from taskgrad.worker import checkpoint

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20}
_UNITS["GIB"] = 1 << 30
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_STAGED = "taskgrad-"


@dataclass(frozen=True)
class Pretrained:
    """What a model of transformers has besides its weights.

    Attributes
    ----------
    kind
        The name of its class.
    configs
        The objects that write ``config.json`` and its like.
    tied
        The names that are left out, being tied to others.
    left_out
        Other names that are not saved.
    """

    kind: str
    configs: tuple[Any, ...]
    tied: frozenset[str]
    left_out: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> Pretrained | None:
        """That of a model; None if it is not one of transformers, or has adapters."""
        config = getattr(module, "config", None)
        saves = [getattr(part, "save_pretrained", None) for part in (type(module), config)]
        if not all(map(callable, saves)) or getattr(module, "peft_config", None) is not None:
            return None
        configs = [config]
        generation = getattr(module, "generation_config", None)
        if generation is not None and callable(getattr(generation, "save_pretrained", None)):
            can = getattr(module, "can_generate", None)
            configs += [generation] if not callable(can) or can() else []
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        left_out = getattr(module, "_keys_to_ignore_on_save", None) or ()
        return cls(
            type(module).__name__,
            copy.deepcopy(tuple(configs)),
            frozenset(tied),
            frozenset(left_out),
        )

    def saved_name(self, info: ParameterInfo) -> str:
        """The name under which a tensor is saved."""
        return next((name for name in info.names if name not in self.tied), info.name)


def shard_size(value: int | str) -> int:
    """The bytes that a number or a text such as ``"5GB"`` says.

    Raises TypeError or ValueError if it is none.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", value.strip().upper())
        if match and match[2] in _UNITS:
            value = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_shard_size is a number of bytes, or '5GB'; got {shown(value)}")
    if isinstance(value, str) or value < 1:
        raise ValueError(f"max_shard_size is a number of bytes, or '5GB'; got {shown(value)}")
    return value


def save(layout: Layout, model: Pretrained, path: Path, most: int) -> None:
    """Write the weights and the configuration, while no step runs; see `GraphChain`.

    Raises CheckpointError if they cannot be written.
    """
    plan = _files(layout, model, most)
    staged = path / f"{_STAGED}{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        tasks = []
        for shard, files in plan.items():
            firsts = {first for names in files.values() for first in names.values()}
            buffers = {}
            for first in firsts:
                if layout.tensors[first].is_buffer:
                    layer = layout.owner(first)
                    buffers[first] = checkpoint.Place(layer.index, local_name(first, layer), True)
            arguments = {"folder": str(staged), "files": files, "buffers": buffers}
            tasks.append(layout.task(shard, checkpoint.save_weights, arguments))
        written = {name: about for done in layout.results(tasks) for name, about in done.items()}
        check_visible(staged, written)
        _write_configs(layout, model, staged)
        sync_folder(staged)
        _publish(path, staged, _index(layout, model, written))
    except OSError as error:
        raise CheckpointError(f"cannot write a model to {path}: {error}") from error
    finally:
        if not _is_named(path, staged):
            shutil.rmtree(staged, ignore_errors=True)


def _is_named(path: Path, staged: Path) -> bool:
    """True if the folder's index names files in this one: publishing them was cut short."""
    try:
        return f'"{staged.name}/' in (path / WEIGHTS_INDEX).read_text(encoding="utf-8")
    except OSError:
        return False


def _files(layout: Layout, model: Pretrained, most: int) -> dict[Any, dict[str, dict[str, str]]]:
    """By shard and file the first names of tensors, by the names that they are saved under."""
    found: list[tuple[Any, dict[str, str]]] = []
    for shard in layout.shards:
        size = most + 1
        for first, info in layout.tensors.items():
            name = model.saved_name(info)
            if layout.home(first) is not shard or not info.persistent or name in model.left_out:
                continue
            if size + info.nbytes > most:
                found.append((shard, {}))
                size = 0
            found[-1][1][name] = first
            size += info.nbytes
    plan: dict[Any, dict[str, dict[str, str]]] = {}
    for i, (shard, names) in enumerate(found, 1):
        plan.setdefault(shard, {})[f"model-{i:05d}-of-{len(found):05d}.safetensors"] = names
    return plan


def _index(layout: Layout, model: Pretrained, written: Mapping[str, Any]) -> dict[str, Any]:
    weights = {name: file for file, about in written.items() for name in about["tensors"]}
    contents = {n: kept for about in written.values() for n, kept in about["tensors"].items()}
    tied: dict[str, str] = {}
    total = 0
    for info in layout.tensors.values():
        saved = model.saved_name(info)
        if saved in weights:
            tied |= {name: saved for name in info.names if name != saved}
            total += info.nbytes
    return new_weights_index(weights, tied, contents, total)


def _write_configs(layout: Layout, model: Pretrained, folder: Path) -> None:
    config, *others = copy.deepcopy(model.configs)
    config.architectures = [model.kind]
    dtype = next((i.dtype for i in layout.tensors.values() if i.dtype.is_floating_point), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    for one in (config, *others):
        one.save_pretrained(folder)


def _publish(path: Path, staged: Path, index: dict[str, Any]) -> None:
    """Put complete files in the place of those that are there."""
    weights: dict[str, str] = index["weight_map"]
    files = dict.fromkeys(weights.values())
    where = {name: f"{staged.name}/{file}" for name, file in weights.items()}
    new = staged / "index"
    write_json(new, {"metadata": {}, "weight_map": where})
    for file in staged.glob("*.json"):
        os.replace(file, path / file.name)
    os.replace(new, path / WEIGHTS_INDEX)
    (path / SINGLE).unlink(missing_ok=True)
    sync_folder(path)
    for name in files:
        link = staged / f"{name}.link"
        try:
            os.link(staged / name, link)
        except OSError:  # this filesystem has no hard links
            shutil.copyfile(staged / name, link)
        os.replace(link, path / name)
    write_json(new, index)
    os.replace(new, path / WEIGHTS_INDEX)
    sync_folder(path)
    for file in path.iterdir():
        if _SHARD.fullmatch(file.name) and file.name not in files:
            file.unlink(missing_ok=True)
        elif file.is_dir() and re.fullmatch(f"{_STAGED}[0-9a-f]{{8}}", file.name):
            shutil.rmtree(file, ignore_errors=True)
