"""Files on the disk that the driver and the workers write together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskgrad.errors import CheckpointError


def check_visible(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the driver sees the files that workers wrote, by their sizes."""
    for file, about in files.items():
        there = folder / file
        size = there.stat().st_size if there.is_file() else None
        if size != about["bytes"]:
            raise CheckpointError(
                f"a worker wrote {there} ({about['bytes']} bytes), and the driver sees "
                f"{'no such file' if size is None else f'{size} bytes there'}: a checkpoint goes "
                "to a filesystem that the driver and all workers share"
            )


def write_json(file: Path, value: Any) -> None:
    """Write a file of JSON, and wait until it is on the disk."""
    with file.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.flush()
        os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
