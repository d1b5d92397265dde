"""Everywhere: true sizes of tensors for Dask's `sizeof`, which takes each for 80 bytes otherwise.

The scheduler weighs transfers, and workers their memory, by these numbers. A tensor counts the
bytes that it takes in a message: a view its own elements, an expanded one its distinct elements, a
sparse one its indices and values. A module counts each parameter and buffer once, and gradients. A
container counts as in Dask (which samples long lists), except that views of one storage never count
more than the storage.

The ``dask.sizeof`` entry point calls `register` while dask itself is being imported, so this
module imports neither dask nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from taskgrad.graph.sparse import components

if TYPE_CHECKING:
    import torch

_counted: ContextVar[dict[int, int] | None] = ContextVar("taskgrad_counted", default=None)
"""Bytes counted so far, by address of their storage, while `sizeof` of a container runs."""


def register(sizeof: Any) -> None:
    """Register tensors and modules, once torch is imported, and containers of them."""
    for kind in (list, tuple, set, frozenset, dict):
        sizeof.register(kind, _container()(sizeof.dispatch(kind)))

    @sizeof.register_lazy("torch")
    def register_torch() -> None:
        import torch

        sizeof.register(torch.Tensor, tensor_bytes)
        sizeof.register(torch.nn.Module, module_bytes)


@contextmanager
def _container() -> Iterator[None]:
    """Count views of one storage in this block, or in a call of the decorated function, once."""
    if _counted.get() is not None:  # inside another container
        yield
        return
    token = _counted.set({})
    try:
        yield
    finally:
        _counted.reset(token)


def tensor_bytes(t: torch.Tensor) -> int:
    """The bytes of a tensor and its gradient, with the Python object's own."""
    size = sys.getsizeof(t) + _data_bytes(t)
    if t.is_leaf and t.grad is not None:
        size += _data_bytes(t.grad)
    return size


@_container()
def module_bytes(module: torch.nn.Module) -> int:
    """The bytes of a module's tensors, tied ones once; other attributes are negligible."""
    return sys.getsizeof(module) + sum(map(tensor_bytes, [*module.parameters(), *module.buffers()]))


def _data_bytes(t: torch.Tensor) -> int:
    if t.device.type == "meta" or t.is_nested:
        return 0
    return sum(map(_dense_bytes, components(t)))


def _dense_bytes(t: torch.Tensor) -> int:
    count = t.numel()
    if count and 0 in t.stride():
        for size, stride in zip(t.shape, t.stride(), strict=True):
            count //= size if stride == 0 else 1
    return _not_yet_counted(t, count * t.element_size())


def _not_yet_counted(t: torch.Tensor, nbytes: int) -> int:
    """The bytes that a tensor adds to its container, of `nbytes` that it has of its storage."""
    counted = _counted.get()
    if counted is None:
        return nbytes
    try:
        storage = t.untyped_storage()
        address, limit = storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a subclass that wraps others has none
        return nbytes
    before = counted.get(address, 0)
    counted[address] = max(before, min(before + nbytes, limit))
    return counted[address] - before
