"""Find and read the weights of a model in files.

Three things can be read: one safetensors file; a folder of them with an index, as Hugging Face's
libraries write it; and a checkpoint of ours, whose weights are such a folder inside it.

Files that taskgrad wrote have checksums: of each tensor, in its file and in both indexes, and of
the indexes themselves. They are compared whenever a tensor is read. Files of other programs have
none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from taskgrad.arguments import shown
from taskgrad.errors import CheckpointError
from taskgrad.formats.encoding import decode

CHECKPOINT = "checkpoint.json"
"""The one file of a checkpoint that says which of its folders counts."""
WEIGHTS_INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_RESAVE = "load it in plain torch or transformers and save it as safetensors"
_VERSION = 1
FORMAT = {"format": "taskgrad", "version": _VERSION}
"""The entries that the index of every checkpoint has."""
_CONTENTS = "taskgrad"
"""The key in a file's metadata, and in that of the folder's index, for what taskgrad wrote."""
_NEEDED = (
    *("step", "folder", "settings", "stage_of", "tensors", "optimizer", "schedulers", "scaler"),
    *("extra", "files", "driver"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, where its name is `key`.

    `written` is what `about` returned when taskgrad wrote it; None if another program did.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    written: dict[str, Any] | None = None

    def read(self, handle: Any) -> torch.Tensor:
        """The tensor's value from the open file, compared with what was written.

        Raises CheckpointError if it is damaged.
        """
        value: torch.Tensor = handle.get_tensor(self.key)
        if self.written is not None:
            compare(value, self.written, self.key, self.file)
        return value


def about(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor's dtype, shape and checksum, as JSON."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "crc32": checksum(tensor),
    }


def checksum(tensor: torch.Tensor) -> int:
    """The CRC-32 of a tensor's bytes, row by row."""
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def compare(value: torch.Tensor, written: Mapping[str, Any], name: str, file: str | Path) -> None:
    """Raise CheckpointError unless a tensor is the one that was written."""
    found = about(value)
    for what, word in (("dtype", "dtype"), ("shape", "shape"), ("crc32", "checksum")):
        if what in written and found[what] != written[what]:
            detail = "" if what == "crc32" else f": {found[what]} and not {written[what]}"
            raise CheckpointError(f"{name!r} in {file} is damaged: its {word} differs{detail}")


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON values with their checksum."""
    return {**values, "checksum": checksum_of(values)}


def checksum_of(values: Mapping[str, Any]) -> int:
    """The checksum of JSON values without the one that is among them."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def contents(written: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file with these tensors, each described by `about`."""
    return {"format": "pt", _CONTENTS: json.dumps(with_checksum({"tensors": written}))}


def _read_contents(place: Path, text: Any) -> dict[str, Any]:
    """Inverse of `contents`."""
    try:
        found = json.loads(text)
        whole = found["checksum"] == checksum_of(found)
        tensors: dict[str, Any] = found["tensors"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{place} is damaged: its metadata cannot be read") from error
    if not whole:
        raise CheckpointError(f"{place} is damaged: the checksum of its metadata differs")
    return tensors


def path_of(path: Any) -> Path:
    """The user's path as an absolute one; TypeError if it is not a path."""
    if not isinstance(path, str | os.PathLike) or path == "":
        raise TypeError(f"a path is a string or a pathlib.Path; got {path!r}")
    return Path(os.fsdecode(path)).absolute()


@contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """A safetensors file, to read from.

    Its bytes are read and not mapped: Dask counts what a process has mapped as its memory.

    Raises CheckpointError if the file is not there, is no safetensors file, or was cut short.
    """
    try:
        # The class is untyped; `with` on it returns the handle.
        with safe_open(str(file), "pt", backend="pread") as handle:
            yield handle
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} cannot be read as safetensors; it is damaged or was cut short: {error}"
        ) from error


def read_index(path: Path) -> dict[str, Any]:
    """The index of the checkpoint in a folder.

    Raises CheckpointError if there is none, it is damaged, or another version of taskgrad wrote it
    in another format.
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
    absent = [name for name in _NEEDED if name not in index]
    if absent or ("checksum" in index and index["checksum"] != checksum_of(index)):
        raise CheckpointError(
            f"{file} is damaged: "
            + (f"it lacks {', '.join(absent)}" if absent else "its checksum differs")
        )
    return index


def find_weights(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of a model's weights by its name; tied ones under each of theirs.

    Raises CheckpointError if there are no weights at `path`, or they cannot be read.
    """
    place = path_of(path)
    if place.suffix in (".bin", ".pt", ".pth") and place.is_file():
        raise CheckpointError(f"{place} is a pickle, which is not read: {_RESAVE}")
    if place.is_file():
        return _of_file(place)
    if not place.is_dir():
        raise CheckpointError(f"there are no weights at {place}: no such file or folder")
    files: dict[str, Any] = {}
    if (place / CHECKPOINT).is_file():
        index = read_index(place)
        place, files = place / index["folder"], index["files"]
    if not (place / WEIGHTS_INDEX).is_file():
        if (place / SINGLE).is_file():
            return _of_file(place / SINGLE)
        pickled = next((file.name for file in sorted(place.glob("*.bin"))), None)
        raise CheckpointError(
            f"there are no weights in {place}: it has none of {CHECKPOINT}, {WEIGHTS_INDEX}, "
            f"{SINGLE}"
            + (f". {pickled} is a pickle, which is not read: {_RESAVE}" if pickled else "")
        )
    weight_map, tied, known = _read_weights_index(place / WEIGHTS_INDEX)
    known = known | {n: kept for file in files.values() for n, kept in file["tensors"].items()}
    by_file = {name: _of_file(place / name) for name in dict.fromkeys(weight_map.values())}
    absent = [name for name, file in weight_map.items() if name not in by_file[file]]
    absent += [name for name in tied.values() if name not in weight_map]
    if absent:
        raise CheckpointError(
            f"{place / WEIGHTS_INDEX} names tensors that its files do not have: {absent[:5]}"
        )
    there = {name: stored for found in by_file.values() for name, stored in found.items()}
    there |= {name: by_file[file][name] for name, file in weight_map.items()}
    there = {n: replace(s, written=known[n]) if n in known else s for n, s in there.items()}
    return there | {other: there[name] for other, name in tied.items()}


def new_weights_index(
    weight_map: Mapping[str, str],
    tied: Mapping[str, str],
    written: Mapping[str, Any],
    total_size: int,
) -> dict[str, Any]:
    """The index that Hugging Face's libraries read; tied parameters are in it under one name."""
    ours = with_checksum({"tensors": written, "weight_map": weight_map, "tied": tied})
    metadata = {"total_size": total_size, "tied": tied, _CONTENTS: ours}
    return {"metadata": metadata, "weight_map": weight_map}


def _read_weights_index(file: Path) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """The file of each tensor, names tied to others, and what `about` returned for tensors."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = dict(index["weight_map"])
        metadata = index.get("metadata") or {}
        tied: dict[str, str] = dict(metadata.get("tied") or {})
        ours = metadata.get(_CONTENTS)
        names = [*weight_map.values(), *tied.values()]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name is no string")
        whole = ours is None or (
            ours["checksum"] == checksum_of(ours)
            and (ours["weight_map"], ours["tied"]) == (weight_map, tied)
        )
        known: dict[str, Any] = {} if ours is None else dict(ours["tensors"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{file} is damaged: its checksum differs")
    return weight_map, tied, known


def check_state(state: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise unless this is a state dict whose values can be loaded; shapes are checked elsewhere.

    `dtypes` are those of the tensors that the model has, by their names.

    Raises TypeError if it is not a mapping of tensors by name, or a tensor has no values or another
    kind of dtype.
    """
    if not isinstance(state, Mapping):
        known = "; pass its state_dict()" if isinstance(state, nn.Module) else ""
        raise TypeError(f"a state is a dict of tensors by their names; got {shown(state)}{known}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"a state is a dict of tensors by their names; got the key {name!r}")
        if name not in dtypes:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"the state's {name!r} is no tensor; got {shown(value)}. torch.as_tensor makes one "
                "of an array or a number, tg.collect of a thunk"
            )
        if value.is_meta or value.layout is not torch.strided:
            kind = "on the meta device: it has no values" if value.is_meta else "not dense"
            raise TypeError(f"the state's {name!r} is {kind}. Give a dense tensor with values")
        if value.is_complex() and not dtypes[name].is_complex:
            raise TypeError(
                f"the state's {name!r} is complex, and the model's is {dtypes[name]}. Give its "
                "real part, if that is what is meant"
            )


def _of_file(file: Path) -> dict[str, Stored]:
    with opened(file) as handle:
        text = (handle.metadata() or {}).get(_CONTENTS)
        keys = list(handle.keys())
        written = dict.fromkeys(keys) if text is None else _read_contents(file, text)
        if set(keys) != set(written):
            raise CheckpointError(f"{file} is damaged: its tensors have other names")
        return {
            key: Stored(str(file), key, tuple(handle.get_slice(key).get_shape()), written[key])
            for key in keys
        }


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
        There are no weights, they cannot be read, or are damaged: files that taskgrad wrote have
        checksums.

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
            for one in {s.key: s for s in stored.values() if s.file == file}.values():
                values[file, one.key] = one.read(handle)
    state: dict[str, Any] = {name: values[s.file, s.key] for name, s in stored.items()}
    place = path_of(path)
    if (place / CHECKPOINT).is_file():
        index = read_index(place)
        state |= decode(index["extra"], lambda name: _one(place, index, name))
    return state


def _one(path: Path, index: dict[str, Any], name: str) -> torch.Tensor:
    """One of the tensors of a checkpoint that are no weights."""
    file = next(file for file, known in index["files"].items() if name in known["tensors"])
    place = path / index["folder"] / file
    with opened(place) as handle:
        return Stored(str(place), name, (), index["files"][file]["tensors"][name]).read(handle)
