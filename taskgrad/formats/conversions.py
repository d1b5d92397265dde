"""Tensors that are made of tensors in files which have other names there, or are in other pieces.

transformers stores the experts of a mixture one by one, for instance, and its models have them in
one tensor. What makes one of the other is a converter of its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.formats.weights import Stored


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors in files, and a converter of transformers that makes others of them.

    Attributes
    ----------
    packed
        The pickled converter, and the model's configuration.
    first
        The name of the first tensor that it makes.
    sources
        Each with the converter's pattern for it, and its name in the file.
    """

    packed: bytes
    first: str
    sources: tuple[tuple[str, str, Stored], ...]

    def run(self, read: Callable[[Stored], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that it makes, by their names."""
        converter, config = pickle.loads(self.packed)
        for pattern, key, stored in self.sources:
            converter.add_tensor(self.first, key, pattern, read(stored))
        made: dict[str, Any] = converter.convert(self.first, model=None, config=config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


@dataclass(frozen=True)
class Converted:
    """One of the tensors that a conversion makes."""

    conversion: Conversion
    name: str
    shape: tuple[int, ...]


Source = Stored | Converted
"""Where a tensor's value is read."""
