"""Driver, worker: the sizes, in bytes, at which values take another way between processes."""

from __future__ import annotations

LEASE_MESSAGE_MIN = 256 << 10
"""From here on large buffers of a message, or a batch of items, are leased. Fewer cost more to
lease than to send; up to a megabyte it is about the same."""
LEASE_MESSAGE_MAX = 256 << 20
"""Up to here one message leases; the rest is sent. The receiver reads in its event loop, which is
blocked meanwhile: for 30 ms with so many."""
LEASE_BUFFER_MIN = 16 << 10
"""From here on a buffer counts as large: it is leased, or published by its address."""
OWN_FRAME_MIN = 64 << 10
"""From here on a buffer is worth a read of its own on the other side, to aligned memory."""
LEND_MIN = 1 << 20
"""From here on a part of a value that one worker's program sends another's on the host is read from
its memory."""
LEND_TO_RANK_MIN = 256 << 10
"""The same for messages between the ranks of a call, which wait for each other."""
READ_WITH_GIL_MAX = 1 << 20
"""Up to here a read of another process's memory keeps the GIL. It takes less than 0.1 ms; to get
the GIL back from a thread that runs Python code takes 5 ms."""
READ_IN_THREADS_MIN = 4 << 20
"""From here on several threads share a read. Below, one core copies about as fast as two."""
SCATTER_MIN = 1 << 20
"""From here on inputs go straight to a worker, and not with the task through the scheduler."""
PREFETCH_MIN = 64 << 10
"""The same for inputs of a whole training step, which are to be there before they are needed."""
INSPECTED_VALUES_MAX = 64
"""Not bytes: up to so many values of a container are looked at one by one; pickle is faster for
more."""
