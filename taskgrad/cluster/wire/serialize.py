"""Everywhere: Dask's serialization of values with tensors: each tensor a frame, without a copy.

Dask chooses how to serialize a container by its first element, and pickles the others with their
tensors copied into the pickle. But all pickling goes through the serialization family ``pickle``.
Importing this module replaces it by one that reduces tensors as in
`taskgrad.cluster.wire.tensors`, wherever in a value they are: in a tuple, a dataclass, a module, an
optimizer. Tensors and modules themselves are registered with it too.

The result is an ordinary pickle with out-of-band buffers, which any process reads that can import
taskgrad, even if it has not imported this module. Plain ``pickle``, ``copy`` and ``torch.save`` are
unaffected.
"""

from __future__ import annotations

import inspect
import io
import pickle
from typing import Any, NoReturn

import cloudpickle

# First: Dask registers its own family lazily, on the first tensor, over ours.
import distributed.protocol.torch  # noqa: F401
import torch
from distributed.protocol.serialize import (
    dask_serialize,
    pickle_dumps,
    pickle_loads,
    register_serialization_family,
)

from taskgrad.cluster.wire import message_leases
from taskgrad.cluster.wire.tensors import Put, reduce_tensor
from taskgrad.errors import TravelError
from taskgrad.remote_errors import text_of

# These hold no tensor; Dask's own function pickles them as fast as can be.
ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


class TensorPickler(pickle.Pickler):
    """Pickles tensors out of band, all else as always; counts the tensors."""

    tensors = 0
    put: Put | None = None

    def reducer_override(self, obj: Any) -> Any:
        """Called for all but numbers, strings and built-in containers."""
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        self.tensors += 1
        return reduce_tensor(obj, self.put)


class TensorCloudPickler(cloudpickle.Pickler):
    """The same for values that only cloudpickle can pickle: lambdas, classes of ``__main__``."""

    tensors = 0
    put: Put | None = None

    def reducer_override(self, obj: Any) -> Any:
        """Called for all but numbers, strings and built-in containers."""
        if not isinstance(obj, torch.Tensor):
            return super().reducer_override(obj)
        self.tensors += 1
        return reduce_tensor(obj, self.put)


def dumps(value: Any, context: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames, as from Dask's own function except for tensors.

    Like that, it tries pickle first, then cloudpickle. On the way through the scheduler, as to a
    client, Dask uses no out-of-band buffers for the sake of very old Pythons; tensors use them
    there too.
    """
    if type(value) in ATOMS:
        return _stock(value, context)
    try:
        pickled, buffers, found = pickle_with(TensorPickler, value)
        by_value = b"__main__" in pickled or _module_by_value(value)
    except Exception:
        found, by_value = -1, True  # pickled in part only
    if not found and (by_value or (context or {}).get("pickle-protocol", 5) < 5):
        return _stock(value, context)
    if by_value:
        try:
            pickled, buffers, found = pickle_with(TensorCloudPickler, value)
        except Exception:
            return _stock(value, context)  # raises the error to report
    lease = message_leases.current(context)
    if lease is not None:
        pickled, buffers = lease.pack(pickled, buffers)
    # Frames marked False are sent as they are. Dask would cut those over 64 MiB into pieces, and
    # put them together again with a copy. The user's compression, if any, still sees them.
    whole = None if (context or {}).get("compression") else False
    header = {
        "serializer": "pickle",
        "writeable": tuple(not b.readonly for b in buffers),
        "compression": (None, *(whole for _ in buffers)),
    }
    return header, [pickled, *buffers]


def pickle_with(
    kind: Any, value: Any, put: Put | None = None
) -> tuple[bytes, list[memoryview], int]:
    """A value's pickle by one of these picklers, its out-of-band buffers, its number of tensors."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = kind(file, protocol=5, buffer_callback=buffers.append)
    pickler.put = put
    pickler.dump(value)
    return file.getvalue(), [b.raw() for b in buffers], pickler.tensors


def dumps_whole(value: Any) -> bytes:
    """A value's pickle with its tensors in-band, of any dtype.

    Plain pickle cannot read what it writes for some of torch's newer dtypes, such as uint16.
    """
    file = io.BytesIO()
    TensorCloudPickler(file, protocol=5).dump(value)
    return file.getvalue()


def _module_by_value(value: Any) -> bool:
    """True if this value's module is registered with cloudpickle to be pickled by value."""
    by_value = cloudpickle.list_registry_pickle_by_value()
    return bool(by_value) and getattr(inspect.getmodule(value), "__name__", None) in by_value


def _stock(value: Any, context: dict[str, Any] | None) -> tuple[dict[str, Any], list[Any]]:
    header, frames = pickle_dumps(value, context)
    return header, frames


def _not_by_class(value: Any) -> NoReturn:
    """Have Dask fall back from its table of classes to the family ``pickle``."""
    raise NotImplementedError(type(value).__name__)


def loads(header: dict[str, Any], frames: list[Any]) -> Any:
    """Unpickle a value; a SystemExit, which would end Dask's event loop, becomes an error."""
    try:
        return pickle_loads(header, frames)
    except Exception:
        raise
    except BaseException as error:
        raise TravelError(
            f"a value raised when it was unpickled: {text_of(error)}. Check its __setstate__ and "
            "__reduce__"
        ) from error


register_serialization_family("pickle", dumps, loads)
dask_serialize.register(torch.Tensor, _not_by_class)
dask_serialize.register(torch.nn.Parameter, _not_by_class)
dask_serialize.register(torch.nn.Module, _not_by_class)
