"""What tasks compute with parts of sharded tensors: pure functions, but for the files.

Each is called with the worker's store and the values of its inputs. A result may not be a view of a
part, which would keep all of that in memory, if it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.graph.pytree import describe
from taskgrad.worker.failures import layer_errors
from taskgrad.worker.randomness import random_stream
from taskgrad.worker.store import Store


def give(store: Store, part: torch.Tensor) -> torch.Tensor:
    """A part, as it is: to be sent."""
    return part


def copy(store: Store, part: torch.Tensor) -> torch.Tensor:
    """A part of its own of what is read of another one, or was sent."""
    return part.detach().clone(memory_format=torch.contiguous_format)


def join(store: Store, *pieces: torch.Tensor, axis: int) -> torch.Tensor:
    """Pieces along an axis as one part."""
    return torch.cat([piece.detach() for piece in pieces], axis)


def stack(store: Store, *values: Any, axis: int) -> torch.Tensor:
    """Values of ranks, tensors or numbers, stacked."""
    return torch.stack([torch.as_tensor(value).detach() for value in values], axis)
