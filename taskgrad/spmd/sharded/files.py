"""Sharded tensors in files: each worker writes its part, and reads what it shall hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from taskgrad.cluster.session import Session
from taskgrad.errors import CheckpointError
from taskgrad.formats.files import check_visible, sync_folder, write_json
from taskgrad.formats.weights import checksum_of, path_of, with_checksum
from taskgrad.spmd.sharded.layout import Part, Parts, chosen, spans_over
from taskgrad.spmd.sharded.running import call, kept, values, view
from taskgrad.worker import part_files

INDEX = "sharded.json"
"""The one file of a folder that says which of its files count."""
_NAME = re.compile(r"part-[0-9a-f]{8}-[0-9]{5,}\.safetensors")
_FORMAT = {"format": "taskgrad sharded tensor", "version": 1}


def save(x: Parts, folder: str | os.PathLike[str]) -> None:
    """Write the parts, each where it is, and then the index; a tensor that was there goes last.

    Raises CheckpointError if the folder cannot be written, or a worker does not see it.
    """
    path = path_of(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error}") from error
    token = os.urandom(4).hex()
    parts = x.parts if x.axis is not None else x.parts[:1]
    names = [f"part-{token}-{i:05d}.safetensors" for i in range(len(parts))]
    calls = [
        call(
            part_files.write_part,
            part,
            [view(part)],
            title="save",
            stays=False,
            folder=str(path),
            file=name,
        )
        for part, name in zip(parts, names, strict=True)
    ]
    old = _files_of(path)
    try:
        written = dict(zip(names, values(x.session, calls), strict=True))
        check_visible(path, written)
        _write_index(path, x, parts, written)
    except BaseException:
        _remove(path, names)
        raise
    _remove(path, old)


def _write_index(
    path: Path, x: Parts, parts: Sequence[Part], written: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the index, by which the files that are `written` count from now on."""
    index = {
        **_FORMAT,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "axis": x.axis,
        "parts": [
            {"file": name, "start": part.start, "stop": part.stop, **about}
            for part, (name, about) in zip(parts, written.items(), strict=True)
        ],
    }
    try:
        write_json(path / f"{INDEX}.new", with_checksum(index))
        os.replace(path / f"{INDEX}.new", path / INDEX)
        sync_folder(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _remove(path: Path, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (path / name).unlink(missing_ok=True)


def load(folder: str | os.PathLike[str], workers: Any, owner: Session) -> Parts:
    """Read a tensor that `save` wrote, cut along the same axis, onto these workers.

    Raises CheckpointError if there is none, or it is damaged.
    """
    path = path_of(folder)
    index = _read_index(path)
    shape, axis = torch.Size(index["shape"]), index["axis"]
    spans = spans_over(chosen(workers, owner), shape, axis)
    calls = []
    for span in spans:
        reads = []
        for part in index["parts"]:
            start, stop = 0, 0
            if axis is not None:
                start = max(span.start, part["start"])
                stop = min(span.stop, part["stop"])
                if start >= stop and shape[axis]:
                    continue
                start, stop = start - part["start"], stop - part["start"]
            reads.append({**part, "start": start, "stop": stop})
        calls.append(
            call(
                part_files.read_parts,
                span,
                [],
                title="load",
                folder=str(path),
                reads=reads,
                axis=axis,
            )
        )
    parts = kept(owner, spans, calls)
    return Parts(owner, shape, getattr(torch, index["dtype"]), axis, tuple(parts))


def _files_of(path: Path) -> list[str]:
    """The files of the tensor that is in a folder; none if there is none, or it is damaged."""
    try:
        names = [str(part["file"]) for part in _read_index(path)["parts"]]
    except CheckpointError:
        return []
    return [name for name in names if _NAME.fullmatch(name)]


def _read_index(path: Path) -> Mapping[str, Any]:
    file = path / INDEX
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no sharded tensor in {path}: it has no file {INDEX}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT["format"]:
        raise CheckpointError(f"{file} is not the index of a sharded tensor of taskgrad's")
    if found.get("version") != _FORMAT["version"]:
        raise CheckpointError(
            f"{file} has format version {found.get('version')!r}; this taskgrad reads version "
            f"{_FORMAT['version']}"
        )
    if found.get("checksum") != checksum_of(found):
        raise CheckpointError(f"{file} is damaged: its checksum differs")
    return found
