"""What the loss of a microbatch counts for, where that is not its number of samples.

The loss of each microbatch is a mean over something, such as the tokens that are not padding, and
has that number as its weight. The loss and the gradient of all microbatches between two steps of
the optimizer are the weighted means: those of one forward over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from taskgrad.arguments import shown
from taskgrad.train.batch_form import BatchForm

_IGNORED = -100  # the label that torch's losses leave out


@dataclass(frozen=True)
class LossWeight:
    """The weight of a batch's loss: a function of the batch, or the name of a field of it.

    Of a field the entries that are not -100 count. Where it is given to a model that compares the
    logits at each token with the next label, the first label of each row does not count.
    """

    given: Callable[..., Any] | str
    form: BatchForm

    def of(self, x: Any, y: Any) -> float:
        """The weight of inputs and targets.

        Raises TypeError or ValueError unless it is a finite number from 0 on, and ValueError if
        there is no such field.
        """
        if isinstance(self.given, str):
            return self._count(self.given, x, y)
        found = self.given(x) if y is None else self.given(x, y)
        try:
            if isinstance(found, str | bytes):
                raise TypeError
            weight = float(found)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                "loss_weight returns the weight of a microbatch's loss, a number; it gave "
                f"{shown(found)}"
            ) from None
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                "loss_weight returns the weight of a microbatch's loss, a finite number from 0 on; "
                f"it gave {weight}"
            )
        return weight

    def _count(self, name: str, x: Any, y: Any) -> float:
        holders = [part for part in (x, y) if isinstance(part, Mapping) and name in part]
        if len(holders) != 1:
            fields = [key for part in (x, y) if isinstance(part, Mapping) for key in part]
            found = "both inputs and targets have it" if holders else "the batch has no such field"
            raise ValueError(
                f"loss_weight={name!r} names a field of a batch that is a dict, and {found}: "
                f"there are {', '.join(map(repr, fields)) or 'none'}. A function of the batch can "
                "take any part of it"
            )
        field = holders[0][name]
        if not isinstance(field, torch.Tensor):
            raise TypeError(
                f"loss_weight={name!r} counts the entries of a tensor that are not {_IGNORED}; "
                f"that field is {shown(field)}"
            )
        takes = self.form.takes
        if holders[0] is x and takes is not None and takes.shifts_labels:
            field = field[..., 1:]
        return float((field != _IGNORED).sum())


class Accumulation:
    """The weights of the batches of which gradients are accumulated, by the number of their steps.

    A step that is taken back and taken again replaces its own weight.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._totals: dict[int, float] = {}

    def scales(self, weights: Iterable[float], step: int) -> tuple[list[float], float | None]:
        """The factors of the losses of a step's microbatches, which have these weights.

        The weight of all batches is known at the last of them: until then all are divided by that
        of the first times the number of batches. The last step also returns the factor of the sum
        of the gradients that makes up for it, None if there is nothing to make up for.
        """
        weights, first = list(weights), self._first(step)
        # Steps on their way may be of the update before.
        kept = range(first - self._batches, step)
        self._totals = {n: total for n, total in self._totals.items() if n in kept}
        self._totals[step] = sum(weights)
        reference = self._totals[first]
        factor = None
        if self._batches > 1 and step + 1 == first + self._batches:
            total = sum(self._totals[n] for n in range(first, step + 1))
            factor = reference * self._batches / total
        return [w / reference / self._batches for w in weights], factor

    def to_save(self, taken: int) -> list[float]:
        """The weights since the last update, after so many steps."""
        return [self._totals[n] for n in range(self._first(taken), taken) if n in self._totals]

    def resume(self, saved: Iterable[float], taken: int) -> None:
        """Inverse of `to_save`."""
        self._totals = dict(enumerate(saved, self._first(taken)))

    def _first(self, step: int) -> int:
        return step - step % self._batches
