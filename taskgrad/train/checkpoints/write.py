"""Write a checkpoint, so that a crash at any moment leaves a complete one.

Each save makes a new folder, where the workers write their shards side by side; only when all of it
is on the disk is ``checkpoint.json`` replaced, which says which folder counts. Folders that do not
count, those of a crash too, are removed by the next save.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from taskgrad.errors import CheckpointError
from taskgrad.formats.encoding import encode
from taskgrad.formats.files import check_visible, sync_folder, write_json
from taskgrad.formats.weights import (
    CHECKPOINT,
    FORMAT,
    WEIGHTS_INDEX,
    new_weights_index,
    read_index,
    with_checksum,
)
from taskgrad.layout import Layout
from taskgrad.train.checkpoints.inventory import DRIVER, NOT_WRITTEN, inventory, living_on
from taskgrad.worker import checkpoint

# No other folder is ever removed.
_OURS = re.compile(r"step-\d{8}-[0-9a-f]{8}")


def save(
    path: Path,
    layout: Layout,
    step: int,
    options: Mapping[str, Any],
    driver: Mapping[str, Any],
) -> None:
    """Write the state of a trainer while no step runs; see `Trainer.save`.

    `driver` is the state that is not on the workers: plain values and tensors.
    """
    layout.refuse_averages("save")
    folder = path / f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _sweep(path)  # first, for its room on the disk
        folder.mkdir()
        saves = []
        for i, shard in enumerate(layout.shards, 1):
            suffix = f"{i:05d}-of-{len(layout.shards):05d}"
            here = living_on(layout, shard)
            arguments = {"folder": str(folder), "suffix": suffix, **here}
            saves.append(layout.task(shard, checkpoint.save, arguments))
        answers = layout.results(saves)
        index = _index(layout, step, _settings(options), folder.name, answers)
        index |= _write_driver(folder, driver, index["files"])
        check_visible(folder, index["files"])
        write_json(folder / WEIGHTS_INDEX, _weights_index(layout, answers))
        sync_folder(folder)
        sync_folder(path)
        write_json(path / f"{CHECKPOINT}.new", with_checksum(index))
        os.replace(path / f"{CHECKPOINT}.new", path / CHECKPOINT)
        sync_folder(path)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {path}: {error}") from error
    finally:
        if path.is_dir():
            _sweep(path)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments as JSON, with a mark for those that are functions."""
    found = {}
    for name, value in options.items():
        try:
            found[name] = encode(value, name, {})
        except CheckpointError:
            found[name] = NOT_WRITTEN
    return found


def _index(
    layout: Layout, step: int, settings: dict[str, Any], folder: str, answers: list[dict[str, Any]]
) -> dict[str, Any]:
    steps = {answer["step"] for answer in answers}
    if steps != {step}:
        raise CheckpointError(f"the trainer is at step {step}, its shards at {steps}")
    optimizers = {i: a["optimizer"] for i, a in enumerate(answers) if a["optimizer"]}
    return {
        **FORMAT,
        "taskgrad": version("taskgrad"),
        "step": step,
        "folder": folder,
        "settings": settings,
        "stage_of": {row.name: layout.shards.index(layout.shard_of(row)) for row in layout.layers},
        "tensors": inventory(layout),
        "optimizer": {
            "class": next(o["class"] for o in optimizers.values()),
            "groups": [{"stage": i, **g} for i, o in optimizers.items() for g in o["groups"]],
            "state": {n: kept for o in optimizers.values() for n, kept in o["state"].items()},
        },
        "schedulers": {str(i): answers[i]["scheduler"] for i in optimizers},
        "scaler": answers[0]["scaler"],
        "averaged": answers[0]["averaged"],
        "extra": {name: value for a in answers for name, value in a["extra"].items()},
        "files": {file: about for a in answers for file, about in a["files"].items()},
    }


def _write_driver(folder: Path, state: Any, files: dict[str, Any]) -> dict[str, Any]:
    """Write the driver's state, its tensors to a file that is added to `files`."""
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode(dict(state), "driver", tensors)
    files[DRIVER] = checkpoint.write("the driver", folder / DRIVER, tensors)
    return {"driver": encoded}


def _weights_index(layout: Layout, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of the folder with the weights."""
    files = [(file, about) for answer in answers for file, about in answer["files"].items()]
    weights = {
        n: file for file, about in files if file.startswith("model-") for n in about["tensors"]
    }
    infos = [info for name, info in layout.tensors.items() if name in weights]
    tied = {other: info.name for info in infos for other in info.names[1:]}
    written = {n: kept for _, about in files for n, kept in about["tensors"].items()}
    total = sum(info.nbytes for info in infos)
    return new_weights_index(weights, tied, {name: written[name] for name in weights}, total)


def _sweep(path: Path) -> None:
    """Remove what saves left behind: all folders of ours but the one that counts."""
    current = None
    if (path / CHECKPOINT).exists():
        try:
            current = read_index(path)["folder"]
        except CheckpointError:
            return  # any of them may be the one that was meant
    for entry in path.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name != current:
            shutil.rmtree(entry, ignore_errors=True)
