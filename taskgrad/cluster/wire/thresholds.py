"""Driver, worker: the sizes at which values take another way between processes.

Bytes, unless a name says otherwise. Measured on two to eight cores, over TCP within a host.
"""

from __future__ import annotations

LEASE_MESSAGE_MIN = 256 << 10
"""Large buffers of a message, or a batch of items, from which on they are leased. A lease of fewer
costs more than sending them; up to a megabyte it is about the same."""
LEASE_BUFFER_MIN = 16 << 10
"""A buffer that is leased, or published by address; smaller ones are copied into the message."""
LEASE_MESSAGE_MAX = 256 << 20
"""Buffers that one message leases. The receiver reads them in its event loop, which is blocked
meanwhile, 30 ms for so many. The others are sent, piece by piece."""
OWN_FRAME_MIN = 64 << 10
"""A buffer with a frame of its own, aligned for vector instructions; smaller ones share a frame,
which costs a copy and saves a read."""
READ_WITH_GIL_MAX = 1 << 20
"""A read of another process's memory that keeps the GIL: it takes less than 0.1 ms, and to get the
GIL back from a thread that runs Python code takes 5 ms."""
READ_IN_THREADS_MIN = 4 << 20
"""A read that several threads share; below, one core copies about as fast as two."""
SCATTER_MIN = 1 << 20
"""Inputs that go straight to a worker, and not with the task through the scheduler."""
PREFETCH_MIN = 64 << 10
"""The same where the graph has several steps of training: what is sent is there ahead of time."""
INSPECTED_VALUES_MAX = 64
"""Values of a container that are looked at one by one; pickle looks through longer ones faster."""
