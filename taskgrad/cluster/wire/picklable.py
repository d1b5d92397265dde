"""Worker: check that a task's result can be pickled, before the task ends.

If pickling fails only when another worker asks for the result, the task that depends on it hangs,
and later transfers between the two workers may fail. The check must cost next to nothing: tensors
and small containers of them are accepted by type; anything else is pickled once without its
tensors, and the pickle discarded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from distributed.protocol.serialize import dask_serialize
from torch._C._functorch import is_functorch_wrapped_tensor

from taskgrad.cluster.wire.serialize import ATOMS, TensorCloudPickler, TensorPickler
from taskgrad.cluster.wire.thresholds import INSPECTED_VALUES_MAX
from taskgrad.errors import TravelError
from taskgrad.remote_errors import text_of

_DEVICES = ("cpu", "cuda", "meta", "mps", "xpu")
_LAYOUTS = frozenset(
    {
        *(torch.strided, torch.sparse_coo, torch.sparse_csr),
        *(torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
    }
)


def check_picklable(value: Any) -> None:
    """Raise TravelError if this value cannot be sent to another worker.

    It names the part that cannot be sent, by its place in the value and its type.
    """
    if _is_plain(value) or _can_be_pickled(value):
        return
    problem = _problem(value)
    if problem is None:  # Dask serializes it in its own way
        return
    place, part, why = _culprit(value, problem)
    where = f"its part {place}, " if place else ""
    raise TravelError(
        f"this result cannot be sent to another worker: {where}"
        f"a {type(part).__module__}.{type(part).__qualname__}: {why}. "
        "Return tensors, numbers or other values that can be pickled"
    )


def _can_be_pickled(value: Any) -> bool:
    """Raises if the value can be pickled but not unpickled: its receiver would wait forever."""
    for kind in (_Checker, _CloudChecker):
        file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        pickler = kind(file, protocol=5, buffer_callback=buffers.append)
        try:
            pickler.dump(value)
        except Exception:
            continue
        try:
            _Unchecker(io.BytesIO(file.getvalue()), pickler.kept, buffers).load()
        except BaseException as error:
            raise TravelError(
                f"this result can be pickled, but raises when it is unpickled "
                f"({text_of(error)}): a {type(value).__module__}.{type(value).__qualname__}. Check "
                "its __setstate__ and __reduce__"
            ) from error
        return True
    return False


def _is_plain(value: Any) -> bool:
    """True if types alone show that a value can be pickled; False decides nothing."""
    kind = type(value)
    if kind in ATOMS:
        return True
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return tensor_problem(value) is None and not value.__dict__
    if kind is tuple or kind is list:
        return len(value) <= INSPECTED_VALUES_MAX and all(map(_is_plain, value))
    if kind is dict:
        return len(value) <= INSPECTED_VALUES_MAX and all(
            type(k) in ATOMS and _is_plain(v) for k, v in value.items()
        )
    return False


def _extension() -> str:
    """The type of device that an extension of torch has added here; it may come at any time."""
    name: str = torch._C._get_privateuse1_backend_name()
    return name


def tensor_problem(t: torch.Tensor) -> str | None:
    """The reason why this tensor cannot be sent, or None."""
    if t.layout not in _LAYOUTS:
        return f"its layout is {t.layout}; .to_dense() makes it one that can"
    if not t.is_cpu and t.device.type not in (*_DEVICES, _extension()):
        return f"it is on the device {t.device}"
    if is_functorch_wrapped_tensor(t):
        return "it exists only inside the torch.func transform that made it"
    return None


class _Checked:
    """Pickles tensors as numbers, so that only everything else is checked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[torch.Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return super().reducer_override(obj)  # type: ignore[misc]
        why = tensor_problem(obj)
        if why is not None:
            raise pickle.PicklingError(why)
        if type(obj) is torch.Tensor or type(obj) is torch.nn.Parameter:
            self.kept.append(obj)
            number = len(self.kept) - 1
            return _kept, (number,), obj.__dict__ or None, None, None, _ignore_state
        return super().reducer_override(obj)  # type: ignore[misc]


class _Checker(_Checked, TensorPickler):
    pass


class _CloudChecker(_Checked, TensorCloudPickler):
    pass


def _ignore_state(obj: Any, state: Any) -> None:
    """Set no attributes: the tensor has them already."""


def _kept(number: int) -> torch.Tensor:
    raise NotImplementedError  # `_Unchecker` has another in its place


class _Unchecker(pickle.Unpickler):
    """Unpickles what a checker wrote, with the same tensors."""

    def __init__(self, file: Any, kept: list[torch.Tensor], buffers: Any) -> None:
        super().__init__(file, buffers=buffers)
        self._kept = kept

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name == _kept.__name__:
            return self._kept.__getitem__
        return super().find_class(module, name)


class _DaskChecker(_Checker):
    """The same, and accepts classes that Dask serializes in its own way."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor | torch.nn.Module | type):
            try:
                dask_serialize.dispatch(type(obj))
            except TypeError:
                pass
            else:
                return int, ()
        return super().reducer_override(obj)


class _Void:
    def write(self, data: Any) -> int:
        return len(data)


def _problem(value: Any) -> str | None:
    """The reason why this value cannot be serialized, or None; tries what Dask does."""
    why = None
    for kind in (_Checker, _CloudChecker, _DaskChecker):
        try:
            kind(_Void(), protocol=5, buffer_callback=lambda _: None).dump(value)
            return None
        except Exception as error:
            why = why or str(error)
    return why


def _culprit(value: Any, why: str) -> tuple[str, Any, str]:
    """The innermost part that cannot be serialized: its place in the value, the part, and why."""
    for place, part in _parts(value):
        problem = _problem(part)
        if problem is not None:
            inner, found, reason = _culprit(part, problem)
            return place + inner, found, reason
    return "", value, why


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        return
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", getattr(value, name)) for name in value._fields)
    elif isinstance(value, tuple | list | set | frozenset):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{f.name}", getattr(value, f.name)) for f in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        yield from ((f".{name}", part) for name, part in vars(value).items())
