"""Driver, worker: values in the messages between a driver and the programs on workers."""

from __future__ import annotations

import pickle
from typing import Any

from distributed.comm.core import Comm
from distributed.protocol.serialize import Serialized

from taskgrad.cluster.wire import thresholds
from taskgrad.cluster.wire.serialize import dumps, dumps_whole
from taskgrad.graph.pytree import tensors


def serialized(value: Any, comm: Comm) -> Serialized:
    """A value as a message on this connection has it, its tensors without a copy.

    Raises what pickling it raises, where Dask's own function would raise its own error.
    """
    header, frames = dumps(value)
    if comm.peer_address.startswith("inproc://"):  # it would read the user's memory, and later
        frames = [bytearray(frame) for frame in frames]
    return Serialized({**header, "serializer": "pickle"}, frames)


def serialized_if_large(value: Any, comm: Comm) -> Serialized | bytes:
    """The same, or a small value in one piece; for `loads`."""
    small = sum(t.nbytes for t in tensors(value)) < thresholds.OWN_FRAME_MIN
    return dumps_whole(value) if small else serialized(value, comm)


def loads(value: Any) -> Any:
    """A value as it was, on the other side; Dask has read what came in several pieces."""
    return pickle.loads(value) if isinstance(value, bytes) else value
