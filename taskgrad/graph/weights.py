"""Where a model's weights lie in files: their names, shapes, and which file has each.

Three things can be read: one safetensors file; a folder of them with an index, as Hugging Face's
libraries write it; and a checkpoint of ours, whose weights are such a folder inside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from taskgrad.errors import CheckpointError
from taskgrad.graph.encoding import decode

CHECKPOINT = "checkpoint.json"
"""The one file of a checkpoint that says which of its folders counts."""
WEIGHTS_INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_VERSION = 1


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; it stands there under `key`."""

    file: str
    key: str
    shape: tuple[int, ...]


@contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """A safetensors file, to read from.

    Its bytes are read and not mapped: Dask counts what a process has mapped as its memory.

    Raises
    ------
    CheckpointError
        It is not there, is not such a file, or was cut short.
    """
    try:
        # The class is untyped; `with` on it gives the handle.
        with safe_open(str(file), "pt", backend="pread") as handle:
            yield handle
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors; it is damaged or was cut short: {error}"
        ) from error


def read_index(path: Path) -> dict[str, Any]:
    """The index of the checkpoint in a folder.

    Raises
    ------
    CheckpointError
        There is none, it is damaged, or another version of taskgrad wrote it in another format.
    """
    file = path / CHECKPOINT
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"there is no checkpoint in {path}: it has no file {CHECKPOINT}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != "taskgrad":
        raise CheckpointError(f"{file} is not the index of a taskgrad checkpoint")
    if index.get("version") != _VERSION:
        raise CheckpointError(
            f"{file} has format version {index.get('version')!r}, written by taskgrad "
            f"{index.get('taskgrad')}; this taskgrad reads version {_VERSION}"
        )
    return index


def new_index() -> dict[str, Any]:
    """What every index starts with."""
    return {"format": "taskgrad", "version": _VERSION}


def find_weights(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of a model's weights by its name; tied ones under each of theirs.

    Raises
    ------
    CheckpointError
        There are no weights at `path`, or they cannot be read.
    """
    place = Path(path).absolute()
    if place.is_file():
        return _of_files([place])
    if not place.is_dir():
        raise CheckpointError(f"there are no weights at {place}: no such file or folder")
    if (place / CHECKPOINT).is_file():
        place = place / read_index(place)["folder"]
    if not (place / WEIGHTS_INDEX).is_file():
        if (place / SINGLE).is_file():
            return _of_files([place / SINGLE])
        raise CheckpointError(
            f"there are no weights in {place}: it has none of {CHECKPOINT}, {WEIGHTS_INDEX}, "
            f"{SINGLE}"
        )
    try:
        index = json.loads((place / WEIGHTS_INDEX).read_text(encoding="utf-8"))
        weight_map: dict[str, str] = index["weight_map"]
        tied: dict[str, str] = index.get("metadata", {}).get("tied", {})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{place / WEIGHTS_INDEX} cannot be read: {error!r}") from error
    there = _of_files([place / name for name in dict.fromkeys(weight_map.values())])
    absent = [name for name in weight_map if name not in there]
    if absent:
        raise CheckpointError(
            f"{place / WEIGHTS_INDEX} names tensors that its files do not have: {absent[:5]}"
        )
    return there | {other: there[name] for other, name in tied.items()}


def _of_files(files: list[Path]) -> dict[str, Stored]:
    found = {}
    for file in files:
        with opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118  no dict
                shape = tuple(handle.get_slice(key).get_shape())
                found[key] = Stored(str(file), key, shape)
    return found


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Weights from files into plain torch, on the CPU; needs no cluster.

    Parameters
    ----------
    path
        A checkpoint that `Trainer.save` wrote; a safetensors file; or a folder of them, with the
        ``model.safetensors.index.json`` that Hugging Face's libraries write.

    Returns
    -------
    dict
        For ``model.load_state_dict``: parameters and persistent buffers by the model's own names,
        a tied one under each of its names.

    Raises
    ------
    CheckpointError
        There are no weights, or they cannot be read.

    Examples
    --------
    >>> import tempfile, torch, taskgrad as tg
    >>> from safetensors.torch import save_file
    >>> model = torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
    ...     model.load_state_dict(tg.load_state_dict(folder))
    <All keys matched successfully>
    """
    stored = find_weights(path)
    values: dict[tuple[str, str], torch.Tensor] = {}
    for file in dict.fromkeys(s.file for s in stored.values()):
        with opened(file) as handle:
            for key in dict.fromkeys(s.key for s in stored.values() if s.file == file):
                values[file, key] = handle.get_tensor(key)
    state: dict[str, Any] = {name: values[s.file, s.key] for name, s in stored.items()}
    place = Path(path).absolute()
    if (place / CHECKPOINT).is_file():
        index = read_index(place)
        state |= decode(index["extra"], lambda name: _one(place, index, name))
    return state


def _one(path: Path, index: dict[str, Any], name: str) -> torch.Tensor:
    """One of the tensors of a checkpoint that are no weights."""
    file = next(file for file, known in index["files"].items() if name in known["tensors"])
    with opened(path / index["folder"] / file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor
