"""Driver: tensors that tasks of several calls take, which are sent to their workers once.

As `taskgrad.executors.kept_inputs` does for resident programs. A tensor is sent again when it is
not what it was, or other workers take it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from taskgrad.cluster.session import Session
from taskgrad.cluster.wire.thresholds import SCATTER_MIN
from taskgrad.executors.base import Submitted
from taskgrad.executors.kept_inputs import State, state_of
from taskgrad.executors.registry import executor_of
from taskgrad.graph.leaves import Leaf


@dataclass
class _Known:
    """A tensor as it was when a leaf was made of it; `held` is what was sent, once it was."""

    tensor: weakref.ref[torch.Tensor]
    state: State
    workers: tuple[str, ...]
    leaf: weakref.ref[Leaf]
    held: Submitted | None = None


class KeptLeaves:
    """The tensors that one session's workers keep."""

    def __init__(self, owner: weakref.ref[Session]) -> None:
        self._owner = owner
        self._known: dict[int, _Known] = {}  # by the id of the tensor
        self._lock = threading.RLock()  # a tensor may end in any thread, in this one too

    def leaf(self, tensor: torch.Tensor, workers: Sequence[str], **about: Any) -> Leaf:
        """A leaf of this tensor; where its workers have it, its task is there already.

        `about` are further arguments of `Leaf`.
        """
        owner = self._owner()
        state = state_of(tensor) if tensor.nbytes >= SCATTER_MIN else None
        if state is None or owner is None:
            return Leaf(tensor, **about)
        executor, takers = executor_of(owner), tuple(dict.fromkeys(workers))
        with self._lock:
            known = self._known.get(id(tensor))
            if known is not None and known.tensor() is tensor:
                self._look(owner, known)
                held, same = known.held, (known.state, known.workers) == (state, takers)
                if held is not None and same and executor.failure(held) is None:
                    leaf = Leaf(tensor, key=held.key, **about)
                    executor.hold(leaf, held)
                    return leaf
            leaf = Leaf(tensor, **about)
            this, key = weakref.ref(self), id(tensor)

            def ended(reference: weakref.ref[torch.Tensor]) -> None:
                found = this()
                if found is not None:
                    found._ended(key, reference)

            self._known[key] = _Known(weakref.ref(tensor, ended), state, takers, weakref.ref(leaf))
            return leaf

    def look(self) -> None:
        """A call was submitted: keep what was sent with it."""
        owner = self._owner()
        if owner is not None:
            with self._lock:
                for known in list(self._known.values()):
                    self._look(owner, known)

    def _look(self, owner: Session, known: _Known) -> None:
        leaf = known.leaf()
        executor = executor_of(owner)
        if known.held is None and leaf is not None and executor.is_submitted(leaf):
            known.held = Submitted(leaf, None)
            executor.hold(known.held, leaf)

    def _ended(self, key: int, reference: weakref.ref[torch.Tensor]) -> None:
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.tensor is reference:
                del self._known[key]


_kept: WeakKeyDictionary[Session, KeptLeaves] = WeakKeyDictionary()
_lock = threading.Lock()


def kept_leaves_of(owner: Session) -> KeptLeaves:
    """Those of this session."""
    with _lock:
        return _kept.setdefault(owner, KeptLeaves(weakref.ref(owner)))
