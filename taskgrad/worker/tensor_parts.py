"""What tasks compute with parts of sharded tensors: pure functions, but for the files.

Each is called with the worker's store and the values of its inputs. A result may not be a view of a
part, which would keep all of that in memory, if it stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from taskgrad.errors import TaskgradError
from taskgrad.graph import pack
from taskgrad.graph.pytree import Slot, Structure, describe
from taskgrad.graph.reductions import reduced
from taskgrad.worker.failures import layer_errors
from taskgrad.worker.randomness import random_stream
from taskgrad.worker.store import Store


def give(store: Store, part: torch.Tensor) -> torch.Tensor:
    """A part, as it is: to be sent."""
    return part


def copy(store: Store, part: torch.Tensor) -> torch.Tensor:
    """A part of its own of what is read of another one, or was sent."""
    return _own(part)


def join(store: Store, *pieces: torch.Tensor, axis: int) -> torch.Tensor:
    """Pieces along an axis as one part."""
    return torch.cat([piece.detach() for piece in pieces], axis)


def stack(store: Store, *values: Any, axis: int) -> torch.Tensor:
    """Values of ranks, tensors or numbers, stacked."""
    return torch.stack([torch.as_tensor(value).detach() for value in values], axis)


def apply(
    store: Store,
    *operands: Any,
    call: bytes,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> torch.Tensor:
    """An elementwise function of parts and of what was sent with the call."""
    function, leaves, structure = pack.loads_plain(call)
    with layer_errors(f"{name} of a sharded tensor", name, store.worker):
        args, kwargs = _fill(leaves, structure, operands)
        result = _checked(function(*args, **kwargs), shape, name)
        _check_dtype(result, dtype, name)
        return result


def apply_mapped(
    store: Store, part: torch.Tensor, *, call: bytes, name: str, seed: int, start: int
) -> torch.Tensor:
    """A user's function of a copy of a part, in a random stream fixed by the seed and its place."""
    function = pack.loads_plain(call)
    with (
        layer_errors(f"{name!r}, mapped over a sharded tensor,", name, store.worker),
        random_stream(seed, 0, start, "map"),
    ):
        return _checked(function(part.clone()), tuple(part.shape), name)


def _fill(leaves: Sequence[Any], structure: Structure, operands: Sequence[Any]) -> Any:
    return structure.build([operands[x.index] if type(x) is Slot else x for x in leaves])


def _checked(result: Any, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The result as a part: on the host, in memory of its own."""
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != shape:
        raise ValueError(
            f"{name!r} of a part of shape {list(shape)} is a tensor of that shape; it gave "
            f"{describe(result)}. Use tg.pmap for what changes the shape"
        )
    if result.requires_grad:
        raise TaskgradError(
            f"{name!r} gave a tensor that takes a gradient, and sharded tensors carry none: take "
            "gradients inside (torch.func.grad), or use torch.no_grad()"
        )
    return _own(result)


def _check_dtype(result: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise TypeError unless the result is what the driver takes it for."""
    if result.dtype is not dtype:
        raise TypeError(
            f"{name} gave {result.dtype} on a worker, and {dtype} on the driver, for tensors "
            "without values: call it outside of torch.autocast"
        )


def reduce(
    store: Store,
    part: torch.Tensor,
    *,
    name: str,
    dims: tuple[int, ...],
    keepdim: bool,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    """A reduction of one part over these dimensions."""
    result = reduced(part, name, dims, keepdim, options)
    _check_dtype(result, dtype, name)
    return _own(result)


def report(
    store: Store, *values: torch.Tensor, given: int, ranks: int
) -> tuple[list[torch.Tensor], list[list[bytes]]]:
    """The first `given` values; and of the others, so many ranks' of each leaf, digests."""
    rest = values[given:]
    digests = [_digests(rest[at : at + ranks]) for at in range(0, len(rest), ranks)]
    return list(values[:given]), digests


def _digests(values: Sequence[torch.Tensor]) -> list[bytes]:
    """A hash of each value's bits, to compare them with another worker's."""
    first = _bits(values[0])
    known = hashlib.blake2b(first.numpy().data, digest_size=32).digest()
    found = [known]
    for value in values[1:]:
        bits = _bits(value)
        # To compare is faster than to hash.
        same = torch.equal(bits, first)
        found.append(known if same else hashlib.blake2b(bits.numpy().data, digest_size=32).digest())
    return found


def _bits(value: torch.Tensor) -> torch.Tensor:
    plain = value.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def of_array(store: Store, value: Any) -> torch.Tensor:
    """A part of a NumPy array, a tensor, or a partition of a dataframe, which can be made one."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    # Received arrays may be read-only, and are Dask's.
    return _own(value) if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))


def to_array(store: Store, part: torch.Tensor) -> np.ndarray[Any, Any]:
    """A part as an array that cannot be written."""
    array: np.ndarray[Any, Any] = part.numpy()
    array.flags.writeable = False
    return array


def _own(value: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in memory of its own."""
    plain = value.detach().resolve_conj().resolve_neg().cpu()
    return plain.clone(memory_format=torch.contiguous_format)
