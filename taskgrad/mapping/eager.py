"""Eager gradients: the backward of a chunk's losses, right after its forward.

A training loop maps the same function step after step, and goes back through the sum of its losses
each time. After two such maps in a row the driver predicts a third (`BackwardPredictor`), and the
workers differentiate each chunk as soon as it has run, whatever its size. Without a prediction they
do where that costs little.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from taskgrad.graph.cotangents import Gradient
from taskgrad.mapping.reducing import Widened
from taskgrad.mapping.segments import Segment, differentiate, on_host, total
from taskgrad.worker.failures import backward_error
from taskgrad.worker_names import WorkerName

# Without a prediction: if the backward takes less than a round trip, and gradients are small.
_MOST_S = 0.02
_MOST_BYTES = 1 << 20
# Two in a row: where every other map is for evaluation, no gradient is computed for nothing.
_IN_A_ROW = 2
_TUPLES = ("tuple", "namedtuple")


class EagerOptions(NamedTuple):
    """When a chunk's losses are differentiated as soon as it has run: if asked, or if it pays.

    `asked` is the user's ``eager_grad``; `seed` the cotangent of all losses. It pays in any case if
    a backward with that cotangent is predicted.
    """

    asked: bool | None
    seed: float
    predicted: bool


class EagerGradients(NamedTuple):
    """Gradients of the closed-over tensors, summed, and of the items' tensors.

    They are for one cotangent of all losses, whose positions among the outputs are `leads`.
    `shared` is None where the worker sums those of several chunks.
    """

    leads: list[int]
    shared: list[Gradient] | None
    items: list[Gradient]


def differentiate_eagerly(
    segments: Sequence[Segment],
    options: EagerOptions,
    seconds: float,
    threads: int,
    title: str,
    worker: WorkerName,
) -> EagerGradients | None:
    """Gradients, if they were asked for, or pay after a forward that took `seconds`.

    If they were asked for, raises TypeError if a result is no loss, LayerError if autograd raised.
    """
    if options.asked is False:
        return None
    losses = [_losses(segment) for segment in segments]
    if any(found is None for found in losses):
        if options.asked:
            raise TypeError(
                f"eager_grad=True, and {title!r} returns something that is neither a "
                "0-d tensor that requires grad nor a tuple led by one"
            )
        return None
    pays = options.predicted or (seconds <= _MOST_S and _size(segments) <= _MOST_BYTES)
    if not (options.asked or pays):
        return None
    leads = [set(found or ()) for found in losses]
    seeds: list[list[Gradient]] = [
        [torch.full_like(o, options.seed) if i in at else None for i, o in enumerate(p.outputs)]
        for p, at in zip(segments, leads, strict=True)
    ]
    try:
        shared, taken = differentiate(segments, seeds, threads, retain=True)
    except Exception as error:
        if options.asked:
            raise backward_error(error, worker, title, None) from error
        return None  # an error of the backward, if one comes
    positions, before = [], 0
    for segment, at in zip(segments, leads, strict=True):
        positions += [before + i for i in sorted(at)]
        before += len(segment.outputs)
    items = [on_host(g) for grads in taken for g in grads]
    return EagerGradients(positions, list(map(on_host, total(shared))), items)


def _size(segments: Sequence[Segment]) -> int:
    tensors = [*segments[0].shared, *(t for segment in segments for t in segment.taken)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _losses(segment: Segment) -> list[int] | None:
    """The positions among a segment's outputs of its results' losses; None if one has none."""
    results, leads, before = segment.results, [], 0
    for structure in results.structures:
        widened = structure.kind == "namedtuple" and structure.context[0] is Widened
        value = structure.children[0] if widened else structure
        first = value.children[0] if value.kind in _TUPLES and value.count else value
        if first.kind != "leaf" or not results.flags[before]:
            return None
        leads.append(before)
        before += structure.count
    outputs = (i for i, flag in enumerate(results.flags) if flag)
    position = {leaf: i for i, leaf in enumerate(outputs)}
    positions = [position[lead] for lead in leads]
    return positions if all(segment.outputs[i].dim() == 0 for i in positions) else None


@dataclass
class _History:
    """How many maps in a row had a backward with the same cotangent for all losses, and which."""

    cotangent: float = 1.0
    in_a_row: int = 0


# By the function's code, so that a lambda in a loop is one function; or by the module.
_histories: weakref.WeakKeyDictionary[Any, _History] = weakref.WeakKeyDictionary()


class BackwardPredictor:
    """Predicts the backward of one map of a function.

    `cotangent` is that of all its losses; None if no backward is predicted.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        while isinstance(fn, functools.partial):
            fn = fn.func
        fn = getattr(fn, "__func__", fn)
        self._history = _History()
        with contextlib.suppress(TypeError):  # it cannot be hashed, or referred to weakly
            self._history = _histories.setdefault(getattr(fn, "__code__", fn), self._history)
        self._observed = False
        predicted = self._history.in_a_row >= _IN_A_ROW
        self.cotangent = self._history.cotangent if predicted else None

    def observe(self, entries: Sequence[int], cotangents: Sequence[torch.Tensor | None]) -> None:
        """Note the cotangents of the map's backward; `entries` has the result of each output."""
        self._observed = True
        found, history = _of_losses(entries, cotangents), self._history
        if found is None:
            history.in_a_row = 0
        elif found == history.cotangent:
            history.in_a_row += 1
        else:
            history.cotangent, history.in_a_row = found, 1

    def __del__(self) -> None:
        if not self._observed:  # the results are garbage, so no backward can come
            self._history.in_a_row = 0


def _of_losses(entries: Sequence[int], cotangents: Sequence[torch.Tensor | None]) -> float | None:
    """The cotangent of all first outputs, if it is one number and no other output has one."""
    firsts = {entry: at for at, entry in reversed(list(enumerate(entries)))}
    given = {at: c for at, c in enumerate(cotangents) if c is not None}
    if given.keys() != set(firsts.values()) or any(c.dim() for c in given.values()):
        return None
    values = {c.item() for c in given.values()}
    value = values.pop()
    return value if not values and isinstance(value, float) else None
