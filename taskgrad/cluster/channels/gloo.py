"""Worker: channels over torch.distributed's gloo, in a process group of our own.

The group has no part in ``torch.distributed``'s default group, which stays free for the user. For
each peer one thread receives all that comes from it, so a send never waits for the other side's
program; how much can be on its way is for the schedule to bound.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from taskgrad.cluster.channels.frames import FIRST_FRAME, Tag, pack, rest_of, tag_of, unpack

# Between two values any time may pass. A peer that is lost ends the wait at once.
_FOREVER = timedelta(days=365)
_FRAME, _REST = 0, 1  # gloo's tags: of first frames, and of those that follow
_CLOSE: Tag = (2**32 - 1, 0, 0)  # of the last value on a channel
# Frames that may be on their way at a time. Gloo tells of none by itself that it has arrived.
_MOST_SENDING = 8


class GlooChannels:
    """This worker's channels to the others of a group.

    Parameters
    ----------
    host
        The address of this worker's network interface.
    rank, size
        This worker's place among the workers, and their number.
    deliver
        Called in a thread with the tag of each value that comes, and what `unpack` makes it from.
    lost
        Called in a thread with the rank of a worker whose connection has ended.
    """

    def __init__(
        self,
        host: str,
        rank: int,
        size: int,
        deliver: Callable[[Tag, Any], None],
        lost: Callable[[int], None],
    ) -> None:
        self._host = host
        self._rank = rank
        self._size = size
        self._deliver = deliver
        self._lost = lost
        self._store: TCPStore | None = None
        self._group: Any = None
        self._closing = False
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()
        self._threads: list[threading.Thread] = []

    def listen(self) -> int:
        """Start the store at which all workers meet, on the first of them; returns its port."""
        self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def connect(self, host: str, port: int, seconds: float) -> None:
        """Connect to all others, who do the same; raises RuntimeError if that takes longer."""
        store = self._store or TCPStore(
            host, port, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
        store.set_timeout(timedelta(seconds=seconds))
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = _FOREVER
        options._threads = 1
        options._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        prefixed = PrefixStore("taskgrad", store)
        self._group = ProcessGroupGloo(prefixed, self._rank, self._size, options)
        for peer in range(self._size):
            if peer != self._rank:
                thread = threading.Thread(
                    target=self._receive, args=(peer,), name=f"taskgrad-from-{peer}", daemon=True
                )
                thread.start()
                self._threads.append(thread)

    unpack = staticmethod(unpack)

    def send(self, peer: int, tag: Tag, value: Any) -> None:
        """Send a value, whose memory stays as it is until it has arrived."""
        first, *rest = pack(tag, value)
        self._start(peer, first, _FRAME)
        for frame in rest:
            self._start(peer, frame, _REST)
        while len(self._sending) > _MOST_SENDING:
            self._wait()

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sending:
            self._wait()

    def _start(self, peer: int, frame: torch.Tensor, tag: int) -> None:
        self._sending.append((self._group.send([frame], peer, tag), frame))

    def _wait(self) -> None:
        work, _ = self._sending.popleft()
        with contextlib.suppress(RuntimeError):  # its receiver is gone, as `_receive` finds
            work.wait()

    def _receive(self, peer: int) -> None:
        group = self._group
        try:
            while True:
                first = torch.empty(FIRST_FRAME, dtype=torch.uint8)
                group.recv([first], peer, _FRAME).wait()
                tag = tag_of(first)
                if tag == _CLOSE:
                    return
                rest = rest_of(first)
                for frame in rest:
                    group.recv([frame], peer, _REST).wait()
                self._deliver(tag, [first, *rest])
                del first, rest
        except RuntimeError:
            if not self._closing:
                self._lost(peer)

    def close(self, seconds: float) -> None:
        """Close all connections, once the others do the same or so many seconds have passed."""
        self._closing = True
        if self._group is None:
            self._store = None
            return
        for peer in range(self._size):
            if peer != self._rank:
                try:
                    self.send(peer, _CLOSE, None)
                except RuntimeError:
                    continue  # it has gone
        for thread in self._threads:
            thread.join(seconds)
        self._sending.clear()
        self._group = self._store = None
