"""What a worker keeps: shards, tapes, and gradients between a backward and whoever takes them.

One `Store` a worker owns it all. Every entry stands under the Dask key of the task that made it,
and leaves when that key does: when the driver lets go of it, is killed, or cancels it.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taskgrad.errors import TapeError, WorkerLostError
from taskgrad.graph.pytree import Structure
from taskgrad.worker.mailbox import Mail
from taskgrad.worker.settings import ReleasingLock

if TYPE_CHECKING:
    from taskgrad.worker.communicator import Member
    from taskgrad.worker.keeping import Kept
    from taskgrad.worker.optimizing import Update
    from taskgrad.worker.training_state import Training

# Keys let go of before their task was done; the task then has nothing to leave behind.
_MAX_REFUSED = 100_000
# How long a task that waits for a shard keeps its thread.
_KEEP_THREAD_S = 1.0


class ShardLock:
    """A reentrant lock; a task that waits long for it gives its thread back to the worker.

    The layer that has the lock may wait for tasks that are to run in that thread.
    """

    def __init__(self, give_thread_back: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.RLock()
        self._give_thread_back = give_thread_back

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; without `blocking` only if it is free. Returns whether it is taken."""
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        if not self._lock.acquire(timeout=_KEEP_THREAD_S):
            self._give_thread_back()
            self._lock.acquire()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass
class Made:
    """What training needs on a shard, until it is used."""

    optimizer: torch.optim.Optimizer | None
    training: Training | None = None
    loss: Any = None
    compiled: dict[str, Any] | None = None  # options of ``torch.compile`` for the layers


@dataclass
class ResidentShard:
    """The layers of one chain that live here.

    `layers` are modules (or connection functions) by their index in the chain, `names` the chain's
    names for them, `parameters` the trainable and frozen parameters by the chain's first name for
    each. `lock` is held while any of it runs, so that a worker of several threads does not tear it.
    `gradient_bytes` is what was last counted; `uncounted` asks whoever holds the lock to do it.
    `copied` are the parameters of which other shards have copies, `trainable` those that the chain
    knows as such.
    """

    layers: dict[int, Any]
    parameters: dict[str, nn.Parameter]
    device: torch.device
    copied: frozenset[str] = frozenset()
    trainable: frozenset[str] = frozenset()
    mode: bool | None = None
    optimizer: torch.optim.Optimizer | None = None
    made: Made | None = None  # what `use` puts in their place, once every shard has made its own
    kept: Kept | None = None  # its contents from before a load that is under way
    update: Update | None = None  # the last step of a `taskgrad.Optimizer`
    loss: Any = None  # the loss function, on the shard that gives the model's output
    training: Training | None = None  # what a trainer keeps here
    gradient_bytes: int = 0
    uncounted: bool = False
    lock: ShardLock = field(default_factory=ShardLock)

    def why_fixed(self, name: str) -> str | None:
        """Why a hook may not change this parameter now, if so."""
        if self.training is not None and self.training.begun is not None:
            return (
                "which a Trainer changes at the end of a step, once all gradients are there: "
                "leave it to the optimizer"
            )
        if name in self.copied:
            return (
                "and layers on other workers have copies of it, which would stay as they are: "
                "give the layers that share it one worker"
            )
        return None


@dataclass
class Tape:
    """What one forward of one shard saved for its backward."""

    title: str
    inputs: list[list[torch.Tensor | None]]  # per slot, per leaf: the leaf that takes a gradient
    input_structures: list[Structure]
    outputs: list[Any]  # leaves of the output, part of autograd's graph
    output_structure: Structure
    parameters: dict[str, nn.Parameter]
    shard: ResidentShard | None
    member: Member | None = None  # the rank of a process group whose forward it was
    recomputes: bool = False  # looking at what autograd saved would run layers again
    nbytes: int | None = None  # once somebody has counted them
    # Held by a backward, and by code that reads what autograd saved: autograd frees it as it goes,
    # without the GIL, and reading it meanwhile would crash the process.
    lock: ReleasingLock = field(default_factory=lambda: ReleasingLock(threading.Lock()))


def buffers_key(token: str) -> str:
    """Where a forward leaves its function's buffers until they are read, beside its own entry."""
    return f"buffers of {token}"


class Store:
    """Shards, tapes and gradients of one worker, by key. Safe from several threads."""

    def __init__(self, address: str, folder: str) -> None:
        self.address = address
        self.folder = folder  # the worker's own, on a disk
        self.id = uuid.uuid4().hex  # another one after every restart
        self.mail = Mail(self.is_let_go)
        self.changed: Callable[[], None] = lambda: None
        """Called, in any thread, when the first entry has come or the last one has gone."""
        self._entries: dict[str, Any] = {}
        self._refused: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def give_thread_back(self) -> None:
        """Let the worker run another task in place of the one in this thread."""
        if self.mail.carrier is not None:
            self.mail.carrier.give_thread_back()

    def put(self, key: str, entry: Any) -> None:
        """Keep an entry, unless its key was let go of in the meantime."""
        with self._lock:
            if self._refused.pop(key, self) is self:
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
                f"worker {self.address} does not hold {token.partition('-')[0]!r}: it was "
                "restarted since the chain was made. Make the chain again"
            )
        return entry

    def tape(self, token: str, *, keep: bool) -> Tape:
        """The tape under this token, for its one use unless kept."""
        with self._lock:
            entry = self._entries.get(token) if keep else self._pop(token)
        if not isinstance(entry, Tape):
            raise TapeError(
                f"worker {self.address} holds no tape of {token.partition('-')[0]!r}: it was used "
                "by an earlier backward, or let go of. Run the forward again"
            )
        return entry

    def take(self, key: str) -> Any:
        """Any entry, once."""
        with self._lock:
            entry = self._pop(key)
        if entry is None:
            raise KeyError(key)
        return entry

    def gradients(self, key: str) -> dict[str, torch.Tensor | None]:
        """Parameter gradients that the backward task `key` left here."""
        found: dict[str, torch.Tensor | None] = self._entries[key]
        return found

    def release(self, keys: list[str]) -> None:
        """Let go of these keys, now or as soon as their tasks end."""
        with self._lock:
            for key in keys:
                self._pop(buffers_key(key))
                if self._pop(key) is None:
                    self._refused[key] = None
                    if len(self._refused) > _MAX_REFUSED:
                        self._refused.popitem(last=False)
        self.mail.release(keys)

    def is_let_go(self, key: str) -> bool:
        """Whether nobody waits any more for the task of this key, which has yet to end."""
        return key in self._refused

    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._entries

    def _pop(self, key: str) -> Any:
        entry = self._entries.pop(key, None)
        if entry is not None and not self._entries:
            self.changed()
        return entry

    def entries(self) -> dict[str, Any]:
        """All entries by key, as they are now."""
        with self._lock:
            return dict(self._entries)

    def held(self) -> dict[str, int]:
        """How many shards, tapes and gradient sets there are."""
        entries = list(self.entries().values())
        return {
            "shards": sum(isinstance(e, ResidentShard) for e in entries),
            "tapes": sum(isinstance(e, Tape) for e in entries),
            "gradients": sum(isinstance(e, dict) for e in entries),
        }
