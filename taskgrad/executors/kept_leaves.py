"""Driver: tensors that tasks of several calls take, which are sent to their workers once.

As `taskgrad.executors.kept_inputs` does for resident programs. A tensor is sent again when it is
not what it was, or other workers take it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from taskgrad.cluster.session import Session
from taskgrad.cluster.wire.thresholds import SCATTER_MIN
from taskgrad.executors.base import Executor, Submitted
from taskgrad.executors.tensor_table import TensorTable, state_of
from taskgrad.graph.leaves import Leaf


@dataclass
class _Sent:
    """By the workers that take a tensor: the last leaf made of it, until what it sent is held."""

    leaves: dict[tuple[str, ...], weakref.ref[Leaf]] = field(default_factory=dict)
    held: dict[tuple[str, ...], Submitted] = field(default_factory=dict)

    def hold(self, executor: Executor) -> None:
        """Hold what was sent with a leaf, beyond the call that took it."""
        for workers, reference in list(self.leaves.items()):
            leaf = reference()
            if leaf is None:
                del self.leaves[workers]
            elif executor.is_submitted(leaf):
                self.held[workers] = Submitted(leaf, None)
                executor.hold(self.held[workers], leaf)
                del self.leaves[workers]


class KeptLeaves:
    """The tensors that one session's workers keep."""

    def __init__(self) -> None:
        self._table = TensorTable[_Sent]()

    def leaf(
        self, executor: Executor, workers: Sequence[str], tensor: torch.Tensor, **about: Any
    ) -> Leaf:
        """A leaf of this tensor; where its workers have it, its task is there already.

        `about` are further arguments of `Leaf`.
        """
        state = state_of(tensor) if tensor.nbytes >= SCATTER_MIN else None
        if state is None:
            return Leaf(tensor, **about)
        takers = tuple(dict.fromkeys(workers))
        with self._table.lock:
            known = self._table.get(tensor, state, _Sent)
            known.hold(executor)
            held = known.held.get(takers)
            if held is not None and executor.failure(held) is None:
                leaf = Leaf(tensor, key=held.key, **about)
                executor.hold(leaf, held)
            else:
                leaf = Leaf(tensor, **about)
                known.leaves[takers] = weakref.ref(leaf)
        return leaf

    def hold(self, executor: Executor) -> None:
        """Calls were submitted: hold what was sent with them."""
        with self._table.lock:
            for known in self._table.values():
                known.hold(executor)


_kept: WeakKeyDictionary[Session, KeptLeaves] = WeakKeyDictionary()
_lock = threading.Lock()


def kept_leaves_of(owner: Session) -> KeptLeaves:
    """Those of this session."""
    with _lock:
        return _kept.setdefault(owner, KeptLeaves())
