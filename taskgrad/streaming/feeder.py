"""The thread that pulls the items of a stream from its input and sends them in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from taskgrad.errors import TravelError
from taskgrad.streaming.batch_codec import BatchEncoder
from taskgrad.streaming.chunk_size import NBYTES
from taskgrad.streaming.window import InFlight, Window

_FLUSH_AFTER_S = 0.01
"""Age at which a batch is sent though it is not full: the input is slow."""
_JOIN_S = 1.0
"""How long `stop` waits for an input to end what it is doing."""


class Feeder:
    """Pulls items while the window has room.

    It is a thread of its own so that an input that blocks does not hold back results. With several
    inputs an item is a tuple, and the shortest ends the stream. `title` is the mapped function's.
    """

    def __init__(
        self,
        inputs: Sequence[Iterator[Any]],
        window: Window,
        send: Callable[[InFlight], None],
        title: str,
    ) -> None:
        self.ended = False
        self.error: BaseException | None = None
        """What the input raised."""
        self._inputs = inputs
        self._window = window
        self._send = send
        self._title = title
        self._encoder: BatchEncoder | None = None
        self._size = 1
        self._opened = 0.0
        self._numbers = 0
        self._thread = threading.Thread(target=self._feed, name="taskgrad-imap-input", daemon=True)

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def stop(self, *, wait: bool) -> None:
        """Close the inputs that are generators, now or when the item that is being pulled is there.

        The window was stopped before.
        """
        with self._window.lock:
            self._encoder = None
        if self._thread.ident is None:
            self._close_inputs()
        elif wait and threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def is_done(self) -> bool:
        """True if all items were sent."""
        return self.ended and self._encoder is None

    def _feed(self) -> None:
        error: BaseException | None = None
        source = self._inputs[0] if len(self._inputs) == 1 else zip(*self._inputs, strict=False)
        lock = self._window.lock
        try:
            while size := self._window.wait_for_room():
                self._size = size
                for item in source:
                    with lock:
                        batch = self._add(item)
                    if batch is not None:
                        break
                else:
                    break
                item = None
                self._send(batch)
        except BaseException as raised:  # for the consumer
            error = raised
        try:
            self._close_inputs()
        except BaseException as raised:
            error = error or raised
        with lock:
            batch = None if self._window.stopped else self.flush()
        if batch is not None:
            self._send(batch)
        with lock:
            self.error = error
            self.ended = True
            self._window.notify()

    def _add(self, item: Any) -> InFlight | None:
        """Encode an item; returns the batch that is full with it."""
        encoder = self._encoder
        if encoder is None:
            encoder = self._encoder = BatchEncoder()
            self._opened = time.monotonic()
        try:
            encoder.add(item)
        except Exception as error:
            kind = type(item)
            raise TravelError(
                f"item {self._window.pulled} of the map of {self._title!r} cannot be sent to a "
                f"worker: a {kind.__module__}.{kind.__qualname__} ({type(error).__name__}: {error})"
            ) from error
        self._window.pulled += 1
        if self._window.stopped or encoder.count >= self._size or encoder.nbytes >= NBYTES:
            return self.flush()
        return None

    def flush(self, *, stale: bool = False) -> InFlight | None:
        """The batch that is being filled, taken out; with `stale` only if it is old."""
        encoder = self._encoder
        if encoder is None or (stale and time.monotonic() - self._opened < _FLUSH_AFTER_S):
            return None
        self._encoder = None
        self._size = max(1, self._size - encoder.count)
        items = encoder.batch()
        first = self._window.pulled - len(items)
        batch = InFlight(self._numbers, first, len(items), items, items.nbytes)
        self._numbers += 1
        self._window.batches[batch.number] = batch
        return batch

    def _close_inputs(self) -> None:
        """Close those that are generators; a file, say, is not ours to close."""
        for one in self._inputs:
            if isinstance(one, Generator):
                one.close()
