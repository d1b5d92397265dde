"""Values with tensors in them on Dask's wire: every tensor a frame of its own, never copied.

Dask judges a container by its first element, and pickles the rest with the tensors inside it
copied in. It has one place, though, that sees whatever is pickled: the family named ``pickle`` in
its table of serialization families. Importing this module puts one there that takes tensors apart
as `taskgrad.cluster.wire.tensors` says, wherever in a value they are: in a tuple, a dataclass, a
module, an optimizer. It also tells Dask to send tensors and modules by that family, so that there
is one way and not two.

What is written stays an ordinary pickle with out-of-band buffers: any process that can import
taskgrad reads it, whether or not it has imported this module. Plain ``pickle``, ``copy`` and
``torch.save`` do not notice.
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
from taskgrad.cluster.wire.tensors import reduce_tensor
from taskgrad.errors import TravelError
from taskgrad.remote_errors import text_of

# These hold no tensor; Dask's own function pickles them as fast as can be.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


class TensorPickler(pickle.Pickler):
    """Pickles tensors out of band, all else as always; counts the tensors."""

    tensors = 0

    def reducer_override(self, obj: Any) -> Any:
        """Called for all but numbers, strings and built-in containers."""
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        self.tensors += 1
        return reduce_tensor(obj)


class TensorCloudPickler(cloudpickle.Pickler):
    """The same for values that only cloudpickle can pickle: lambdas, classes of ``__main__``."""

    tensors = 0

    def reducer_override(self, obj: Any) -> Any:
        """Called for all but numbers, strings and built-in containers."""
        if not isinstance(obj, torch.Tensor):
            return super().reducer_override(obj)
        self.tensors += 1
        return reduce_tensor(obj)


def dumps(value: Any, context: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames: what Dask's own function gives, but for tensors.

    As there, pickle is tried first, then cloudpickle. On its way through the scheduler, as to a
    client, Dask pickles without out-of-band buffers for the sake of very old Pythons; tensors take
    them there too.
    """
    if type(value) in _PLAIN:
        return _stock(value, context)
    try:
        pickled, buffers, found = pickle_with(TensorPickler, value)
        by_value = b"__main__" in pickled or _module_by_value(value)
    except Exception:
        found, by_value = -1, True  # not all of it was looked through
    if not found and (by_value or (context or {}).get("pickle-protocol", 5) < 5):
        return _stock(value, context)
    if by_value:
        try:
            pickled, buffers, found = pickle_with(TensorCloudPickler, value)
        except Exception:
            return _stock(value, context)  # its error is the one to tell
    loan = message_leases.current(context)
    if loan is not None:
        pickled, buffers = loan.pack(pickled, buffers)
    # Frames marked False are sent as they are. Dask would cut those over 64 MiB into pieces, and
    # put them together again with a copy. The user's compression, if any, still sees them.
    whole = None if (context or {}).get("compression") else False
    header = {
        "serializer": "pickle",
        "writeable": tuple(not b.readonly for b in buffers),
        "compression": (None, *(whole for _ in buffers)),
    }
    return header, [pickled, *buffers]


def pickle_with(kind: Any, value: Any) -> tuple[bytes, list[memoryview], int]:
    """A value's pickle by one of these picklers, the memory of its tensors, and how many it has."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = kind(file, protocol=5, buffer_callback=buffers.append)
    pickler.dump(value)
    return file.getvalue(), [b.raw() for b in buffers], pickler.tensors


def dumps_whole(value: Any) -> bytes:
    """A value's pickle with its tensors inside, of whatever dtype.

    Plain pickle cannot read what it writes for some of torch's newer dtypes, such as uint16.
    """
    file = io.BytesIO()
    TensorCloudPickler(file, protocol=5).dump(value)
    return file.getvalue()


def _module_by_value(value: Any) -> bool:
    """Whether somebody asked cloudpickle to pickle all of this value's module."""
    by_value = cloudpickle.list_registry_pickle_by_value()
    return bool(by_value) and getattr(inspect.getmodule(value), "__name__", None) in by_value


def _stock(value: Any, context: dict[str, Any] | None) -> tuple[dict[str, Any], list[Any]]:
    header, frames = pickle_dumps(value, context)
    return header, frames


def _not_by_class(value: Any) -> NoReturn:
    """Send Dask on from its table of classes to the family ``pickle``."""
    raise NotImplementedError(type(value).__name__)


def loads(header: dict[str, Any], frames: list[Any]) -> Any:
    """Unpickle a value. Dask does that in its event loops, which a SystemExit would end."""
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
