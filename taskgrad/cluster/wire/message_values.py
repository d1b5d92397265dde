"""Driver, worker: values in the messages between a driver and the programs on workers."""

from __future__ import annotations

import pickle
from typing import Any

from distributed.comm.core import Comm
from distributed.protocol.serialize import Serialized

from taskgrad.cluster.wire import thresholds
from taskgrad.cluster.wire.serialize import dumps, dumps_whole
from taskgrad.cluster.wire.serialize import loads as loads_pieces
from taskgrad.graph.pytree import tensors


def serialized(value: Any, comm: Comm) -> Serialized:
    """A value as a message on this connection has it, its tensors without a copy.

    Raises what pickling it raises, where Dask's own function would raise its own error.
    """
    header, frames = dumps(value)
    if comm.peer_address.startswith("inproc://"):  # it would read the user's memory, and later
        frames = [bytearray(frame) for frame in frames]
    return Serialized({**header, "serializer": "pickle"}, frames)


class Pieces:
    """A value that is pickled already, in a message over sockets; who reads it has the value.

    `is_copy` is False if the memory of its tensors is that of the value.
    """

    def __init__(self, header: dict[str, Any], frames: list[Any], *, is_copy: bool) -> None:
        self.is_copy = is_copy
        self._header = header
        self._frames = frames

    def __reduce__(self) -> Any:
        return loads_pieces, (self._header, [pickle.PickleBuffer(f) for f in self._frames])


def pieces(value: Any, copied_max: int = 0) -> Pieces:
    """A value as a message over sockets has it: a copy, if it is no larger than this.

    Raises what pickling it raises.
    """
    header, frames = dumps(value)
    is_copy = sum(len(frame) for frame in frames) <= copied_max
    return Pieces(header, list(map(bytes, frames)) if is_copy else frames, is_copy=is_copy)


def serialized_if_large(value: Any, comm: Comm | None) -> Serialized | Pieces | bytes:
    """The same, or a small value in one piece; for `loads`. Without a connection, for sockets."""
    if sum(t.nbytes for t in tensors(value)) < thresholds.OWN_FRAME_MIN:
        return dumps_whole(value)
    return pieces(value) if comm is None else serialized(value, comm)


def loads(value: Any) -> Any:
    """A value as it was, on the other side; what came in several pieces has been read."""
    return pickle.loads(value) if isinstance(value, bytes) else value
