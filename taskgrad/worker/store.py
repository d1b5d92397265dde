"""A worker's store of shards, tapes, parts of sharded tensors, and gradients until they are read.

A worker has one `Store`. Every entry has the Dask key of the task that made it, and is dropped when
the scheduler forgets that key: when the driver releases it, is killed, or cancels it.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.errors import TapeError, WorkerLostError
from taskgrad.worker.mailbox import Mailboxes
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.tape import Tape, WeightTape
from taskgrad.worker_names import WorkerName

# Keys released before their task was done, so that it leaves nothing behind.
_MAX_RELEASED_EARLY = 100_000


def buffers_key(token: str) -> str:
    """The key under which a forward stores its function's buffers until they are read."""
    return f"buffers of {token}"


@dataclass(frozen=True)
class Kept:
    """Values that stay on a worker: the leaves of a rank's output, or a part of a sharded tensor.

    Nothing writes to them.
    """

    values: list[Any]


class Store:
    """Shards, tapes, parts and gradients of one worker, by key. Safe from several threads."""

    def __init__(self, worker: WorkerName, folder: str) -> None:
        self.worker = worker
        self.folder = folder  # the worker's own, on a disk
        self.id = uuid.uuid4().hex  # another one after every restart
        self.mailboxes = Mailboxes(self.is_released, worker=worker, store=self.id)
        self.changed: Callable[[], None] = lambda: None
        """Called, in any thread, when the first entry has come or the last one has gone."""
        self._entries: dict[str, Any] = {}
        self._released_early: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def give_thread_back(self) -> None:
        """Let the worker run another task in place of the one in this thread."""
        if self.mailboxes.transport is not None:
            self.mailboxes.transport.give_thread_back()

    def put(self, key: str, entry: Any) -> None:
        """Keep an entry, unless its key was released in the meantime."""
        with self._lock:
            if self._released_early.pop(key, self) is self:
                first = not self._entries
                self._entries[key] = entry
                if first:
                    self.changed()

    def get(self, key: str) -> Any:
        """The entry under this key; None if there is none.

        A task finds its own entry when Dask runs it again, its result having been moved to another
        worker and lost there.
        """
        return self._entries.get(key)

    def shard(self, token: str) -> ResidentShard:
        """The shard under this token; WorkerLostError if this worker never had it or lost it."""
        entry = self._entries.get(token)
        if not isinstance(entry, ResidentShard):
            raise WorkerLostError(
                f"worker {self.worker} does not hold {token.partition('-')[0]!r}: it was "
                "restarted since the chain was made. Make the chain again"
            )
        return entry

    @contextmanager
    def locked(self, token: str) -> Iterator[ResidentShard]:
        """The shard under this token, with its lock held; raises as `shard` does."""
        shard = self.shard(token)
        with shard.lock:
            yield shard

    def tape(self, token: str, *, keep: bool) -> Tape:
        """The tape under this token, for its one use unless kept."""
        with self._lock:
            entry = self._entries.get(token) if keep else self._remove(token)
        if not isinstance(entry, Tape):
            raise TapeError(
                f"worker {self.worker} holds no tape of {token.partition('-')[0]!r}: it was used "
                "by an earlier backward, or released. Run the forward again"
            )
        return entry

    def weight_tape(self, token: str) -> WeightTape:
        """What a split backward left of the tape under this token, for its one use."""
        with self._lock:
            entry = self._remove(token)
        if not isinstance(entry, WeightTape):
            raise TapeError(
                f"worker {self.worker} holds nothing of {token.partition('-')[0]!r} for the "
                "gradients of its weights: it was used, or released. Run the forward again"
            )
        return entry

    def kept(self, key: str) -> list[Any]:
        """The values kept under this key; WorkerLostError if this worker does not have them."""
        entry = self._entries.get(key)
        if not isinstance(entry, Kept):
            raise WorkerLostError(
                f"worker {self.worker} does not hold this part of a sharded tensor "
                f"({key.partition('-')[0]!r}): it was restarted since it was made. Make the "
                "sharded tensor again"
            )
        return entry.values

    def pending(self, shard: ResidentShard) -> set[str]:
        """The shard's parameters to whose gradients split backwards have yet to add."""
        with self._lock:
            tapes = [e for e in self._entries.values() if type(e) is WeightTape]
        return {name for tape in tapes if tape.shard is shard for name in tape.parameters}

    def pop(self, key: str) -> Any:
        """Remove an entry and return it."""
        with self._lock:
            entry = self._remove(key)
        if entry is None:
            raise KeyError(key)
        return entry

    def gradients(self, key: str) -> dict[str, torch.Tensor | None]:
        """Parameter gradients that the backward task `key` left here."""
        found: dict[str, torch.Tensor | None] = self._entries[key]
        return found

    def take_gradients(self, key: str, names: Sequence[str]) -> list[torch.Tensor | None]:
        """Those of them of these parameters, None where there is none; they are kept no more."""
        with self._lock:
            left = self.gradients(key)
            found = [left.pop(name, None) for name in names]
            if not left:
                self._remove(key)
            return found

    def parts(
        self, name: str, sources: Sequence[str | int], values: Sequence[Any]
    ) -> list[torch.Tensor | None]:
        """The parts of a parameter's gradient, in order, None where there is none.

        A source is the key of a backward task on this worker, or a position among `values`.
        """
        return [
            values[source] if isinstance(source, int) else self.gradients(source).get(name)
            for source in sources
        ]

    def release(self, keys: list[str]) -> None:
        """Drop the entries of these keys, now or as soon as their tasks end."""
        with self._lock:
            for key in keys:
                self._remove(buffers_key(key))
                if self._remove(key) is None:
                    self._released_early[key] = None
                    if len(self._released_early) > _MAX_RELEASED_EARLY:
                        self._released_early.popitem(last=False)
        self.mailboxes.release(keys)

    def discard(self, keys: Sequence[str]) -> None:
        """Drop the entries of these keys, if there are any."""
        with self._lock:
            for key in keys:
                self._remove(key)

    def is_released(self, key: str) -> bool:
        """True if no client needs the result of this task, which has yet to end."""
        return key in self._released_early

    def is_empty(self) -> bool:
        """True if there is no entry."""
        return not self._entries

    def _remove(self, key: str) -> Any:
        entry = self._entries.pop(key, None)
        if entry is not None and not self._entries:
            self.changed()
        return entry

    def entries(self) -> dict[str, Any]:
        """All entries by key, as they are now."""
        with self._lock:
            return dict(self._entries)

    def held(self) -> dict[str, int]:
        """The numbers of shards, tapes, parts and sets of gradients."""
        entries = list(self.entries().values())
        return {
            "shards": sum(isinstance(e, ResidentShard) for e in entries),
            "tapes": sum(isinstance(e, Tape | WeightTape) for e in entries),
            "gradients": sum(isinstance(e, dict) for e in entries),
            "parts": sum(isinstance(e, Kept) for e in entries),
        }
