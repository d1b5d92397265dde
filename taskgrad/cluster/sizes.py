"""True sizes of tensors for Dask, which otherwise takes each for 80 bytes.

The scheduler weighs transfers, and workers their memory, by these numbers. A tensor counts the
bytes that it would put on the wire: a view what it shows, an expanded one what is there once, a
sparse one its indices and values. A module counts each of its parameters and buffers once, and once
more for a gradient. A container is added up as Dask does it, except that views of one storage never
count more than that storage holds. (Of long lists Dask looks at a few elements only.)

The ``dask.sizeof`` entry point calls `register` while dask itself is being imported, so this
module imports neither dask nor torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SPARSE_PARTS = {
    "torch.sparse_coo": ("_indices", "_values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_counted: ContextVar[dict[int, int] | None] = ContextVar("taskgrad_counted", default=None)
"""Bytes counted so far by the address of their storage, while a container is looked through."""


def register(sizeof: Any) -> None:
    """Teach Dask's `sizeof` tensors and modules, once torch is there, and containers of them."""
    for kind in (list, tuple, set, frozenset, dict):
        sizeof.register(kind, _each_storage_once(sizeof.dispatch(kind)))

    @sizeof.register_lazy("torch")
    def register_torch() -> None:
        import torch

        sizeof.register(torch.Tensor, tensor_bytes)
        sizeof.register(torch.nn.Module, module_bytes)


def _each_storage_once(stock: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(stock)
    def container_bytes(value: Any) -> int:
        with _container():
            return stock(value)

    return container_bytes


@contextmanager
def _container() -> Iterator[None]:
    """Views of one storage that are met in this block are counted together."""
    if _counted.get() is not None:  # inside another container
        yield
        return
    token = _counted.set({})
    try:
        yield
    finally:
        _counted.reset(token)


def tensor_bytes(t: torch.Tensor) -> int:
    """A tensor's bytes and its gradient's; those of Python's own object are in it too."""
    size = sys.getsizeof(t) + _data_bytes(t)
    if t.is_leaf and t.grad is not None:
        size += _data_bytes(t.grad)
    return size


def module_bytes(module: torch.nn.Module) -> int:
    """A module's tensors, tied ones once. Its other attributes are small beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    with _container():
        return sys.getsizeof(module) + sum(map(tensor_bytes, tensors))


def _data_bytes(t: torch.Tensor) -> int:
    if t.device.type == "meta":
        return 0
    layout = str(t.layout)
    if layout in _SPARSE_PARTS:
        t = t.detach()
        return sum(_data_bytes(getattr(t, part)()) for part in _SPARSE_PARTS[layout])
    if layout != "torch.strided" or t.is_nested:
        return 0
    count = t.numel()
    if count and 0 in t.stride():
        for size, stride in zip(t.shape, t.stride(), strict=True):
            count //= size if stride == 0 else 1
    return _not_yet_counted(t, count * t.element_size())


def _not_yet_counted(t: torch.Tensor, nbytes: int) -> int:
    """How many more bytes a container has with this tensor, which shows so many of its storage."""
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
