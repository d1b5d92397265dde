"""Begin a loader again where an earlier process left it."""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch

from taskgrad.graph.pytree import flatten

# Of each tensor of a batch so many elements at both ends are compared.
_COMPARED = 64


def random_states(loader: Any) -> dict[str, Any]:
    """The random states that a loader may draw from, and those of its samplers.

    They are this process's (of torch on the CPU, of Python and of NumPy), and those of generators
    that the loader and its samplers have.
    """
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "generators": [generator.get_state() for generator in _generators(loader)],
        "samplers": [sampler.state_dict() for sampler in _samplers(loader, "state_dict")],
    }


def set_random_states(loader: Any, states: Mapping[str, Any]) -> None:
    """Inverse of `random_states`, for a loader that is made the same way."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    for generator, state in zip(_generators(loader), states["generators"], strict=False):
        generator.set_state(state)
    for sampler, state in zip(
        _samplers(loader, "load_state_dict"), states["samplers"], strict=False
    ):
        sampler.load_state_dict(state)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader and its samplers which epoch begins, as ``DistributedSampler`` has to know."""
    for part in [loader, *_samplers(loader, "set_epoch")]:
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def loader_state(loader: Any) -> Any:
    """The state of a loader that can be set, such as torchdata's ``StatefulDataLoader``."""
    return loader.state_dict() if _has_state(loader) else None


def resumed(loader: Iterable[Any], saved: Mapping[str, Any]) -> Iterator[Any]:
    """An iterator over a loader that goes on after the batches which were trained on.

    It sets the random states as they were at the beginning of that epoch. A loader with a state of
    its own takes that; otherwise as many batches are skipped as were trained on. Warns if the last
    of them is another one than it was. Raises ValueError if there are not as many.
    """
    set_random_states(loader, saved["random"])
    count = saved["batch"]
    if count and saved["loader"] is not None and _has_state(loader):
        loader.load_state_dict(saved["loader"])  # type: ignore[attr-defined]
        return iter(loader)
    items = iter(loader)
    item = None
    for i in range(count):
        try:
            item = next(items)
        except StopIteration:
            raise ValueError(
                f"{count} batches of this epoch were trained on before it was interrupted, and now "
                f"the loader yields {i}: give the loader that the fit was begun with"
            ) from None
    if count and saved["checksum"] not in (None, checksum(item)):
        warnings.warn(
            f"the loader cannot be repeated: batch {count - 1} of epoch {saved['epoch']} is not "
            "the one that was trained on, so the rest of this epoch may have batches "
            "twice and leave others out. Draw what is random in it from torch's, NumPy's or "
            "Python's own random state, or from a generator of the DataLoader",
            stacklevel=4,
        )
    return items


def checksum(item: Any) -> int | None:
    """A number that tells batches from each other, from the ends of their tensors.

    None if there are none on this process's CPU.
    """
    found = None
    for leaf in flatten(item)[0]:
        tensor = torch.from_numpy(leaf) if _is_numeric(leaf) else leaf
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            continue
        if tensor.device.type != "cpu":
            continue
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        for part in (flat[:_COMPARED], flat[-_COMPARED:]):
            data = part.contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b""
            found = zlib.crc32(repr(tuple(tensor.shape)).encode() + data, found or 0)
    return found


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"


def _has_state(loader: Any) -> bool:
    return all(callable(getattr(loader, n, None)) for n in ("state_dict", "load_state_dict"))


def _parts(loader: Any) -> Iterator[Any]:
    """A loader and its samplers, each once."""
    seen: set[int] = set()
    stack = [loader]
    while stack:
        part = stack.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        stack += [getattr(part, name, None) for name in ("batch_sampler", "sampler")]


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for part in _parts(loader)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _samplers(loader: Any, method: str) -> list[Any]:
    parts = list(_parts(loader))[1:]
    return [part for part in parts if callable(getattr(part, method, None))]
