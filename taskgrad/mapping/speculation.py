"""With which cotangent the losses of a map will be differentiated, judged by the maps before it.

A training loop maps the same function step after step, and goes back through the sum of its losses
each time. Once that is seen, workers can differentiate a chunk as soon as it has run, whatever its
size, and nobody waits between forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Two in a row: where every other map is for evaluation, none is differentiated in vain.
_IN_A_ROW = 2


@dataclass
class _History:
    """How many maps in a row came back with the same cotangent for all losses, and which."""

    cotangent: float = 1.0
    in_a_row: int = 0


# Of a function's code, so that a lambda in a loop is one function; of a module itself.
_histories: weakref.WeakKeyDictionary[Any, _History] = weakref.WeakKeyDictionary()


class BackwardPredictor:
    """Predicts the backward of one map of a function.

    Attributes
    ----------
    cotangent
        That of all its losses; None if no backward is predicted.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._history = _history_of(fn)
        self._observed = False
        predicted = self._history.in_a_row >= _IN_A_ROW
        self.cotangent = self._history.cotangent if predicted else None

    def observe(self, entries: Sequence[int], cotangents: Sequence[torch.Tensor | None]) -> None:
        """The map's backward came, with these for its outputs, which belong to these results."""
        self._observed = True
        found, history = _of_losses(entries, cotangents), self._history
        if found is None:
            history.in_a_row = 0
        elif found == history.cotangent:
            history.in_a_row += 1
        else:
            history.cotangent, history.in_a_row = found, 1

    def __del__(self) -> None:
        if not self._observed:  # the map's results are gone, and nobody can ask any more
            self._history.in_a_row = 0


def _history_of(fn: Any) -> _History:
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    with contextlib.suppress(TypeError):  # it cannot be hashed, or referred to weakly
        return _histories.setdefault(getattr(fn, "__code__", fn), _History())
    return _History()


def _of_losses(entries: Sequence[int], cotangents: Sequence[torch.Tensor | None]) -> float | None:
    """The one cotangent of all results' first outputs, if nothing else has one."""
    firsts = {entry: at for at, entry in reversed(list(enumerate(entries)))}
    given = {at: c for at, c in enumerate(cotangents) if c is not None}
    if given.keys() != set(firsts.values()) or any(c.dim() for c in given.values()):
        return None
    values = {c.item() for c in given.values()}
    value = values.pop()
    return value if not values and isinstance(value, float) else None
