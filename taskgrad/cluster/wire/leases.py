"""Driver, worker: buffers that other processes of the host read in place, valid for a time.

A lease keeps buffers in memory, and some random bytes, its token:

    owner                                reader
    BufferLease(): a token in memory
    add(buffer), send the addresses ───▶ read_leased: reads the buffers, then the token
                                           valid: the buffers were there all the time
    end(): the token is overwritten,       else: OSError
    then the buffers may be freed

So an owner need not wait for its readers: one that reads too late finds out. What is leased, and
what follows a failed read, is up to the users: `taskgrad.cluster.wire.message_leases`,
`taskgrad.cluster.wire.result_table`, `taskgrad.streaming.batch_codec`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from taskgrad.cluster.wire import process_memory

logger = logging.getLogger("taskgrad")

TOKEN_BYTES = 16


class RemoteBuffer(NamedTuple):
    """The address of a buffer in its owner's memory."""

    address: int
    nbytes: int

    @classmethod
    def of(cls, buffer: memoryview) -> RemoteBuffer:
        """The address of a buffer of this process."""
        return cls(process_memory.address_of(buffer), buffer.nbytes)


class ValidityToken(NamedTuple):
    """Random bytes that are at an address of a process until its lease ends."""

    pid: int
    address: int
    content: bytes

    def is_valid(self) -> bool:
        """True if the lease has not ended; raises OSError if the process cannot be read."""
        found = bytearray(TOKEN_BYTES)
        process_memory.read(self.pid, [(self.address, memoryview(found))])
        return found == self.content

    def is_readable(self) -> bool:
        """True if this process can read the memory of the lease's owner."""
        try:
            return self.is_valid()
        except OSError:
            logger.debug("cannot read the memory of process %d", self.pid, exc_info=True)
            return False


class BufferLease:
    """Keeps buffers in this process's memory, and their token valid, until `end`.

    `payload` is copied into the lease itself, right behind the token.
    """

    def __init__(self, payload: bytes = b"") -> None:
        content = os.urandom(TOKEN_BYTES)
        self._memory = ctypes.create_string_buffer(content + payload, TOKEN_BYTES + len(payload))
        self._buffers: list[memoryview] = []
        self.token = ValidityToken(os.getpid(), ctypes.addressof(self._memory), content)
        self.active = True

    def add(self, buffer: memoryview) -> RemoteBuffer:
        """Keep this buffer too; returns its address."""
        self._buffers.append(buffer)
        return RemoteBuffer.of(buffer)

    def end(self) -> None:
        """Invalidate the token, then release the buffers."""
        self.active = False
        ctypes.memset(self._memory, 0, TOKEN_BYTES)
        self._buffers.clear()

    __del__ = end


def read_leased(token: ValidityToken, parts: Sequence[Any]) -> list[Any]:
    """The same parts with each `RemoteBuffer` replaced by a copy of its bytes.

    OSError if the owner's memory cannot be read, or the lease ended before all was read.
    """
    found, wanted = [], []
    for part in parts:
        if isinstance(part, RemoteBuffer):
            view = process_memory.allocate(part.nbytes)
            wanted.append((part.address, view))
            part = view
        found.append(part)
    if wanted:
        process_memory.read(token.pid, wanted)
        if not token.is_valid():
            raise OSError("a lease of memory ended while it was read")
    return found
